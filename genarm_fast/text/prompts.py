"""Prompts, formatted and tokenised by each member in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from genarm_fast.text.chats import arguments_of
from genarm_fast.text.given import Prompt
from genarm_fast.text.messages import Message
from genarm_fast.text.templates import (
    Rendered,
    end_of_answer,
    ended,
    rendered_chat,
    rendered_text,
    response_ids,
    special_tokens,
    token_ids,
)
from genarm_fast.text.transcripts import as_transcript, transcript_messages

PromptFormat = Literal["text", "transcript", "chat"]  # formats that an ARM may have been trained on

# Characters of a token. A text with fewer characters for each token of the context is not looked at.
LONG_TOKEN = 16


class Reader(Protocol):
    """A reader of prompts: the part of a guided decoder's member that concerns text.

    prompt_format: the format that the member was trained on. None if nobody recorded it; then texts stay texts and
    messages stay messages. chat_template_kwargs: the arguments that the chat template got for every row of the
    training. vocab_size: width of the member's logits. context: most tokens of prompt and response together; None
    without a limit.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None
    chat_template: str | None
    prompt_format: PromptFormat | None
    chat_template_kwargs: dict[str, Any]
    vocab_size: int
    context: int | None


def encode_prompt(reader: Reader, prompt: Prompt, index: int, vocab_size: int) -> list[int]:
    """Return the token ids of a prompt as one member reads it, with the BOS token if its tokenizer adds one.

    index: the prompt's index in errors.

    Raises:
        ValueError: a missing chat template, a prompt of another format than the member was trained on, a prompt without
            tokens, or ids outside the vocabulary.
    """
    rendered = _rendered(reader, prompt, index)
    if rendered is not None:
        _check_length(reader, rendered.text, index)
        try:
            ids = token_ids(reader.tokenizer, rendered)
        except ValueError as error:
            raise ValueError(f"prompts[{index}]: {reader.name}: {error}") from error
    else:
        given: Any = prompt
        ids = list(given)
        if not all(0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(f"prompts[{index}]: token ids {min(ids)}..{max(ids)}: expected 0..{vocab_size - 1}")
    if not ids:
        raise ValueError(f"prompts[{index}]={prompt!r:.80}: {reader.name}'s tokenizer makes no token of it")
    check_ids(reader, ids, index)
    return ids


def _rendered(reader: Reader, prompt: Prompt, index: int = 0) -> Rendered | None:
    """Return a prompt in the format that its reader was trained on; None for token ids, which stay as they are."""
    if not isinstance(prompt, str) and not isinstance(prompt[0], dict):
        return None
    given: Any = prompt
    arguments = dict(arguments_of(prompt))
    for name, trained in reader.chat_template_kwargs.items():
        if arguments.setdefault(name, trained) != trained:
            raise ValueError(
                f"prompts[{index}]: {name}={arguments[name]!r:.60}: expected {trained!r:.60}, with which {reader.name} "
                "was trained"
            )
    if "tools" in arguments and reader.prompt_format in ("text", "transcript"):
        raise ValueError(
            f"prompts[{index}]: tools: {reader.name} was trained on prompts of the format {reader.prompt_format!r}, "
            "which has no place for them"
        )
    messages: list[Message] = (transcript_messages(given) or _as_chat(given)) if isinstance(given, str) else given
    if reader.prompt_format == "transcript":
        try:
            return rendered_text(reader.tokenizer, as_transcript(given), None)
        except ValueError as error:
            raise ValueError(f"prompts[{index}]: {reader.name} was trained on transcripts; {error}") from None
    if isinstance(prompt, str) and reader.prompt_format != "chat":
        return rendered_text(reader.tokenizer, prompt, reader.prompt_template)
    if reader.prompt_format == "text":
        if messages != _as_chat(str(messages[-1]["content"])):
            raise ValueError(
                f"prompts[{index}]: {reader.name} was trained on plain texts: expected one, or one user message alone"
            )
        return rendered_text(reader.tokenizer, messages[0]["content"], reader.prompt_template)
    if reader.chat_template is None:
        raise ValueError(
            f"prompts[{index}]: {reader.name} has no chat template: pass chat_template, or a string as prompt"
        )
    try:
        rendered = rendered_chat(reader.tokenizer, messages, reader.chat_template, **arguments)
        others = {name: value for name, value in arguments.items() if name != "tools"}
        unseen = others != arguments and rendered == rendered_chat(
            reader.tokenizer, messages, reader.chat_template, **others
        )
    except ValueError as error:
        raise ValueError(f"prompts[{index}]: {reader.name}'s chat template can't render it: {error}") from error
    if unseen:
        raise ValueError(f"prompts[{index}]: tools: {reader.name}'s chat template leaves them out")
    return rendered


def _as_chat(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def check_ids(reader: Reader, ids: Sequence[int], index: int) -> None:
    """Raises ValueError if a member has no embedding of one of a prompt's tokens."""
    if max(ids) >= reader.vocab_size:
        raise ValueError(
            f"prompts[{index}]: token id {max(ids)}: expected less than {reader.vocab_size}, {reader.name}'s vocabulary"
        )


def encode_response(
    reader: Reader, prompt: Prompt, response: str, eos_token_ids: frozenset[int], *, append_end: bool = True
) -> list[int]:
    """Return the token ids of a response to a prompt, as in training: with the token that ends a whole response.

    append_end: whether that last token is added.
    """
    rendered, given = _rendered(reader, prompt), list(prompt)
    before: Any = given if rendered is None else token_ids(reader.tokenizer, rendered)
    ids = response_ids(reader.tokenizer, rendered, before, response)
    if not append_end:
        return ids
    chat = isinstance(given[0], dict) or (rendered is not None and reader.prompt_format == "chat")
    return ended(ids, end_of_answer(reader.tokenizer, reader.chat_template if chat else None, eos_token_ids))


def special_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> frozenset[int]:
    """Return the ids of the stop strings that are special tokens, which never show in a text.

    Raises:
        ValueError: a stop string with a special token and further text, which could not be found.
    """
    special = {text: i for i, text in special_tokens(tokenizer).items()}
    for stop in stops:
        inside = [text for text in special if text in stop]
        if stop not in special and inside:
            found = max(inside, key=len)
            raise ValueError(f"stop={stop!r}: expected the special token {found!r} by itself, or none in it")
    return frozenset(special[stop] for stop in stops if stop in special)


def _check_length(reader: Reader, text: str, index: int) -> None:
    """Raises ValueError for a text that is longer than a whole context of the longest tokens. It tokenises nothing.

    The limit is twice that length, because a tokenizer's normaliser may shorten a text.
    """
    if reader.context is None or len(text) <= LONG_TOKEN * reader.context:
        return
    most = 2 * reader.context * max(map(len, reader.tokenizer.get_vocab()))
    if len(text) > most:
        raise ValueError(
            f"prompts[{index}]: {len(text)} characters: expected at most {most}, as many as"
            f" {reader.context} tokens have, the context of {reader.name}"
        )


def check_context(reader: Reader, prompt_tokens: int, new_tokens: int, index: int) -> None:
    """Raises ValueError if prompt and response together do not fit into a member's context."""
    if reader.context is not None and prompt_tokens + new_tokens > reader.context:
        raise ValueError(
            f"prompts[{index}]: {prompt_tokens} prompt tokens + {new_tokens} new tokens: expected at most"
            f" {reader.context}, the context of {reader.name}"
        )


def left_padded(ids: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return left-padded tokens and their mask, as transformers' `generate` takes them: both int64 [R, longest]."""
    width = max(map(len, ids))
    tokens = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return tokens, mask
