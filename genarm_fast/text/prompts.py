"""Prompts: raw strings, chat messages or token ids, formatted and tokenised by each member in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from genarm_fast.text.templates import chat_ids, end_of_answer, ended, text_ids

Prompt = str | list[dict[str, str]] | list[int]


class Reader(Protocol):
    """Who reads prompts: a member of a guided decoder, as far as text is concerned.

    vocab_size: width of its logits. context: tokens that prompt and response may have together, None without a bound.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None
    chat_template: str | None
    vocab_size: int
    context: int | None


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
        return check_text(f"prompts[{index}]", prompt)
    if _is_sequence(prompt) and not prompt:
        raise ValueError(f"prompts[{index}]=[]: expected at least one token id or chat message")
    if _is_sequence(prompt) and all(isinstance(item, Mapping) for item in prompt):
        for message in prompt:
            if "role" not in message or "content" not in message:
                raise ValueError(f"prompts[{index}]: message {message!r}: expected the keys 'role' and 'content'")
            for key in ("role", "content"):
                if not isinstance(message[key], str):  # which templates would spell out
                    raise TypeError(f"prompts[{index}]: message {message!r}: expected a string as {key!r}")
                check_text(f"prompts[{index}]", message[key])
        return [dict(message) for message in prompt]
    if _are_ids(prompt):
        return [int(item) for item in prompt]
    raise TypeError(f"prompts[{index}]={prompt!r}: expected a string, chat messages or token ids")


def check_text(name: str, text: str) -> str:
    """The text. Raises ValueError for half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r}: expected Unicode text, got {text[error.start]!r} in it") from None
    return text


def as_responses(responses: Any, count: int) -> list[str | list[int]]:
    """One response or a sequence of them → a list of `count` responses.

    Raises:
        TypeError, ValueError: something that is no response, named by its index, or another number of them.
    """
    if hasattr(responses, "tolist"):
        responses = responses.tolist()
    if isinstance(responses, str) or (_is_sequence(responses) and responses and isinstance(responses[0], Integral)):
        responses = [responses]
    if not _is_sequence(responses):
        raise TypeError(f"responses={responses!r}: expected a string, token ids, or a list of such")
    if len(responses) != count:
        raise ValueError(f"responses: expected {count}, one per prompt, got {len(responses)}")
    return [_as_response(index, response) for index, response in enumerate(responses)]


def _as_response(index: int, response: Any) -> str | list[int]:
    if hasattr(response, "tolist"):
        response = response.tolist()
    if isinstance(response, str):
        return check_text(f"responses[{index}]", response)
    if _are_ids(response):
        return [int(item) for item in response]
    raise TypeError(f"responses[{index}]={response!r}: expected a string or token ids")


def encode_prompt(reader: Reader, prompt: Prompt, index: int, vocab_size: int) -> list[int]:
    """Token ids of a prompt as one member reads it, beginning-of-sequence included where its tokenizer adds it.

    Raises:
        ValueError: no chat template, no token left, or ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        ids = text_ids(reader.tokenizer, prompt, reader.prompt_template)
    elif isinstance(prompt[0], dict):
        if reader.chat_template is None:
            raise ValueError(
                f"prompts[{index}]: {reader.name} has no chat template: pass chat_template, or a string as prompt"
            )
        try:
            ids = chat_ids(reader.tokenizer, prompt, reader.chat_template)
        except TemplateError as error:  # wrong itself, or it refuses these roles
            raise ValueError(f"prompts[{index}]: {reader.name}'s chat template can't render it: {error}") from error
    else:
        ids = prompt
        if not all(0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(f"prompts[{index}]: token ids {min(ids)}..{max(ids)}: expected 0..{vocab_size - 1}")
    if not ids:
        raise ValueError(f"prompts[{index}]={prompt!r}: {reader.name}'s tokenizer makes no token of it")
    check_ids(reader, ids, index)
    return list(ids)


def check_ids(reader: Reader, ids: Sequence[int], index: int) -> None:
    """Raises ValueError where a member has no embedding of a prompt's token."""
    if max(ids) >= reader.vocab_size:
        raise ValueError(
            f"prompts[{index}]: token id {max(ids)}: expected less than {reader.vocab_size}, {reader.name}'s vocabulary"
        )


def encode_response(reader: Reader, prompt: Prompt, response: str, eos_token_ids: frozenset[int]) -> list[int]:
    """Token ids of a whole response to a prompt, with the token that ends it, as in training."""
    end = end_of_answer(reader.tokenizer, reader.chat_template if isinstance(prompt[0], dict) else None, eos_token_ids)
    return ended(list(reader.tokenizer(response, add_special_tokens=False)["input_ids"]), end)


def check_context(reader: Reader, prompt_tokens: int, new_tokens: int, index: int) -> None:
    """Raises ValueError where prompt and response do not fit into a member's context."""
    if reader.context is not None and prompt_tokens + new_tokens > reader.context:
        raise ValueError(
            f"prompts[{index}]: {prompt_tokens} prompt tokens + {new_tokens} new tokens: expected at most"
            f" {reader.context}, the context of {reader.name}"
        )


def _are_ids(value: Any) -> bool:
    return _is_sequence(value) and all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def left_padded(ids: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask of rows as transformers' `generate` takes them, int64 [R, longest]."""
    width = max(map(len, ids))
    tokens = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return tokens, mask
