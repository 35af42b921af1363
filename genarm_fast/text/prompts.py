"""Prompts: raw strings, chat messages or token ids, formatted and tokenised by each member in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from genarm_fast.text.chats import KEYS, Chat, arguments_of, is_chat_object, template_arguments
from genarm_fast.text.messages import Message, as_message, check_text
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

Prompt = str | list[Message] | list[int]
PromptFormat = Literal["text", "transcript", "chat"]  # what an ARM was trained on

LONG_TOKEN = 16  # characters; texts of fewer a token are not looked at


class Reader(Protocol):
    """Who reads prompts: a member of a guided decoder, as far as text is concerned.

    prompt_format: what it was trained on; None where nobody recorded that, and texts stay texts, messages messages.
    vocab_size: width of its logits. context: tokens that prompt and response may have together, None without a bound.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None
    chat_template: str | None
    prompt_format: PromptFormat | None
    vocab_size: int
    context: int | None


def as_prompts(prompts: Any, *, tools: Any = None, chat_template_kwargs: Any = None) -> list[Prompt]:
    """One prompt or a sequence of them → a list of prompts.

    tools, chat_template_kwargs: what the chat templates get with each prompt that has none of its own.

    Raises:
        TypeError, ValueError: something that is no prompt, named by its index.
    """
    arguments = template_arguments(tools, chat_template_kwargs)
    prompts = _unwrapped(prompts)
    if (
        isinstance(prompts, str)
        or is_chat_object(prompts)
        or (_is_sequence(prompts) and prompts and _begins_a_prompt(prompts[0]))
    ):
        prompts = [prompts]
    if not _is_sequence(prompts):
        raise TypeError(f"prompts={prompts!r:.80}: expected a string, chat messages, token ids, or a list of such")
    if not prompts:
        raise ValueError("prompts=[]: expected at least one prompt")
    parsed = [_as_prompt(index, prompt) for index, prompt in enumerate(prompts)]
    return [_with(arguments, index, prompt) for index, prompt in enumerate(parsed)] if arguments else parsed


def _with(arguments: Mapping[str, Any], index: int, prompt: Prompt) -> Prompt:
    if isinstance(prompt, str) or not isinstance(prompt[0], dict):
        raise ValueError(f"prompts[{index}]: expected chat messages with {min(arguments)!r}, got text or token ids")
    messages: Any = prompt
    return Chat(messages, {**arguments, **arguments_of(prompt)})


def _as_prompt(index: int, prompt: Any) -> Prompt:
    prompt = _unwrapped(prompt)
    if is_chat_object(prompt):
        if unknown := sorted(set(prompt) - set(KEYS)):
            raise ValueError(f"prompts[{index}]: {unknown[0]!r}: expected {', '.join(KEYS)}")
        try:
            arguments = template_arguments(prompt.get("tools"), prompt.get("chat_template_kwargs"))
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from None
        return _with(arguments, index, _as_prompt(index, prompt["messages"]))
    own = arguments_of(prompt)
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(
                f"prompts[{index}]='': expected a non-empty prompt (to start from nothing, give token ids)"
            )
        return check_text(f"prompts[{index}]", prompt)
    if _is_sequence(prompt) and not prompt:
        raise ValueError(f"prompts[{index}]=[]: expected at least one token id or chat message")
    if _is_sequence(prompt) and len(prompt) == 1 and _is_sequence(prompt[0]) and _are_ids(prompt[0]):
        prompt = prompt[0]  # of one row, as tokenizers return tensors
    if _is_sequence(prompt) and all(isinstance(item, Mapping) for item in prompt):
        try:
            messages = [as_message(message) for message in prompt]
            return Chat(messages, own) if own else messages
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from None
    if _are_ids(prompt):
        return [int(item) for item in prompt]
    raise TypeError(f"prompts[{index}]={prompt!r:.80}: expected a string, chat messages or token ids")


def _unwrapped(value: Any) -> Any:
    """Lists in place of tensors, arrays and what a tokenizer returns; tokens that its mask hides are left out."""
    if isinstance(value, Mapping) and "input_ids" in value:
        ids, mask = (_unwrapped(value.get(name)) for name in ("input_ids", "attention_mask"))
        if mask is None:
            return ids
        if ids and _is_sequence(ids[0]):
            return [_unmasked(row, shown) for row, shown in zip(ids, mask)]
        return _unmasked(ids, mask)
    return value.tolist() if hasattr(value, "tolist") else value


def _unmasked(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    return [token for token, shown in zip(ids, mask) if shown]


def _begins_a_prompt(first: Any) -> bool:
    """Whether a list that begins so is one prompt: a chat, or token ids."""
    message = isinstance(first, Mapping) and "input_ids" not in first and not is_chat_object(first)
    return isinstance(first, Integral) or message


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
        raise TypeError(f"responses={responses!r:.80}: expected a string, token ids, or a list of such")
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
    raise TypeError(f"responses[{index}]={response!r:.80}: expected a string or token ids")


def encode_prompt(reader: Reader, prompt: Prompt, index: int, vocab_size: int) -> list[int]:
    """Token ids of a prompt as one member reads it, beginning-of-sequence included where its tokenizer adds it.

    Raises:
        ValueError: no chat template, a prompt that is not of the format it was trained on, no token left, or ids
            outside the vocabulary.
    """
    rendered = _rendered(reader, prompt, index)
    if rendered is not None:
        _check_length(reader, rendered.text, index)
        ids = token_ids(reader.tokenizer, rendered)
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
    """A prompt in the format that its reader was trained on; None for token ids, which are what they are."""
    if not isinstance(prompt, str) and not isinstance(prompt[0], dict):
        return None
    given: Any = prompt
    arguments = arguments_of(prompt)
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
    """Raises ValueError where a member has no embedding of a prompt's token."""
    if max(ids) >= reader.vocab_size:
        raise ValueError(
            f"prompts[{index}]: token id {max(ids)}: expected less than {reader.vocab_size}, {reader.name}'s vocabulary"
        )


def encode_response(
    reader: Reader, prompt: Prompt, response: str, eos_token_ids: frozenset[int], *, append_end: bool = True
) -> list[int]:
    """Token ids of a response to a prompt, with the token that ends a whole one, as in training."""
    rendered, given = _rendered(reader, prompt), list(prompt)
    before: Any = given if rendered is None else token_ids(reader.tokenizer, rendered)
    ids = response_ids(reader.tokenizer, rendered, before, response)
    if not append_end:
        return ids
    chat = isinstance(given[0], dict) or (rendered is not None and reader.prompt_format == "chat")
    return ended(ids, end_of_answer(reader.tokenizer, reader.chat_template if chat else None, eos_token_ids))


def special_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> frozenset[int]:
    """Ids of the stop strings that are special tokens, which never show in a text.

    Raises:
        ValueError: a stop string with a special token and more, which could not fire.
    """
    special = {text: i for i, text in special_tokens(tokenizer).items()}
    for stop in stops:
        inside = [text for text in special if text in stop]
        if stop not in special and inside:
            found = max(inside, key=len)
            raise ValueError(f"stop={stop!r}: expected the special token {found!r} by itself, or none in it")
    return frozenset(special[stop] for stop in stops if stop in special)


def _check_length(reader: Reader, text: str, index: int) -> None:
    """Raises ValueError for a text that is longer than all tokens of a context together; it costs no tokenising.

    Normalisers may shorten texts: hence twice that.
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
