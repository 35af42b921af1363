"""Prompts: raw strings, chat messages or token ids, formatted and tokenised by each member in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from .members import Member

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
    tokenizer = member.tokenizer
    if isinstance(prompt, str):
        text = prompt if member.prompt_template is None else member.prompt_template.replace("{prompt}", prompt)
        # A template may spell out the beginning-of-sequence token; the tokenizer must not add it twice.
        bos = tokenizer.bos_token
        ids = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
    elif isinstance(prompt[0], dict):
        if member.chat_template is None:
            raise ValueError(
                f"prompts[{index}]: {member.name} has no chat template: pass chat_template, or a string as prompt"
            )
        text = render_chat(member, prompt, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
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


def render_chat(member: Member, messages: Any, **kwargs: Any) -> str:
    """Chat messages as the text that a member's template makes of them."""
    text = member.tokenizer.apply_chat_template(messages, chat_template=member.chat_template, tokenize=False, **kwargs)
    return str(text)


def encode_response(member: Member, prompt: Prompt, response: str, eos_token_ids: frozenset[int]) -> list[int]:
    """Token ids of a whole response to a prompt, with the token that ends it, as in training.

    That is the end-of-sequence id that the chat template puts after an answer (Llama 3's is not its tokenizer's), else
    the tokenizer's.
    """
    tokenizer = member.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(prompt[0], dict):
        answer = {"role": "assistant", "content": "ANSWER"}
        after = render_chat(member, [{"role": "user", "content": "Q"}, answer]).rpartition("ANSWER")[2]
        after_ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        end = after_ids[:1] if after_ids[:1] and after_ids[0] in eos_token_ids else end
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], *end]


def check_context(member: Member, prompt_tokens: int, new_tokens: int, index: int) -> None:
    """Raises ValueError where prompt and response do not fit into a member's context."""
    if member.context is not None and prompt_tokens + new_tokens > member.context:
        raise ValueError(
            f"prompts[{index}]: {prompt_tokens} prompt tokens + {new_tokens} new tokens: expected at most"
            f" {member.context}, the context of {member.name}"
        )


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
