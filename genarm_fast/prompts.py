"""Prompts: raw strings, chat messages or token ids, formatted and tokenised by each member in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from .members import Member
from .templates import chat_ids, end_of_answer, text_ids

Prompt = str | list[dict[str, str]] | list[int]


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or a sequence of them → a list of prompts.

    Raises:
        TypeError, ValueError: something that is no prompt, named by its index.
    """
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (_is_sequence(prompts) and prompts and isinstance(prompts[0], (Mapping, Integral))):
        prompts = [prompts]
    if not _is_sequence(prompts):
        raise TypeError(f"prompts={prompts!r}: expected a string, chat messages, token ids, or a list of such")
    if not prompts:
        raise ValueError("prompts=[]: expected at least one prompt")
    return [_as_prompt(index, prompt) for index, prompt in enumerate(prompts)]


def _as_prompt(index: int, prompt: Any) -> Prompt:
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(
                f"prompts[{index}]='': expected a non-empty prompt (to start from nothing, give token ids)"
            )
        return prompt
    if _is_sequence(prompt) and not prompt:
        raise ValueError(f"prompts[{index}]=[]: expected at least one token id or chat message")
    if _is_sequence(prompt) and all(isinstance(item, Mapping) for item in prompt):
        for message in prompt:
            if "role" not in message or "content" not in message:
                raise ValueError(f"prompts[{index}]: message {message!r}: expected the keys 'role' and 'content'")
        return [dict(message) for message in prompt]
    if _is_sequence(prompt) and all(isinstance(item, Integral) and not isinstance(item, bool) for item in prompt):
        return [int(item) for item in prompt]
    raise TypeError(f"prompts[{index}]={prompt!r}: expected a string, chat messages or token ids")


def encode_prompt(member: Member, prompt: Prompt, index: int, vocab_size: int) -> list[int]:
    """Token ids of a prompt as one member sees it, beginning-of-sequence included where its tokenizer adds it.

    Raises:
        ValueError: no chat template, no token left, or ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        ids = text_ids(member.tokenizer, prompt, member.prompt_template)
    elif isinstance(prompt[0], dict):
        if member.chat_template is None:
            raise ValueError(
                f"prompts[{index}]: {member.name} has no chat template: pass chat_template, or a string as prompt"
            )
        ids = chat_ids(member.tokenizer, prompt, member.chat_template)
    else:
        ids = prompt
        if not all(0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(f"prompts[{index}]: token ids {min(ids)}..{max(ids)}: expected 0..{vocab_size - 1}")
    if not ids:
        raise ValueError(f"prompts[{index}]={prompt!r}: {member.name}'s tokenizer makes no token of it")
    if max(ids) >= member.vocab_size:
        raise ValueError(
            f"prompts[{index}]: token id {max(ids)}: expected less than {member.vocab_size}, {member.name}'s vocabulary"
        )
    return list(ids)


def encode_response(member: Member, prompt: Prompt, response: str, eos_token_ids: frozenset[int]) -> list[int]:
    """Token ids of a whole response to a prompt, with the token that ends it, as in training."""
    end = end_of_answer(member.tokenizer, member.chat_template if isinstance(prompt[0], dict) else None, eos_token_ids)
    ids = member.tokenizer(response, add_special_tokens=False)["input_ids"]
    return [*ids, *([] if end is None else [end])]


def check_context(member: Member, prompt_tokens: int, new_tokens: int, index: int) -> None:
    """Raises ValueError where prompt and response do not fit into a member's context."""
    if member.context is not None and prompt_tokens + new_tokens > member.context:
        raise ValueError(
            f"prompts[{index}]: {prompt_tokens} prompt tokens + {new_tokens} new tokens: expected at most"
            f" {member.context}, the context of {member.name}"
        )


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
