"""Read the prompts and responses that callers give: texts, chat messages, token ids, and tokenizers' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from genarm_fast.text.chats import CHAT_KEYS, Chat, arguments_of, is_chat_object, template_arguments
from genarm_fast.text.messages import Message, as_message, check_plain
from genarm_fast.utils.checks import number

Prompt = str | list[Message] | list[int]
# Keys of a prompt as vLLM takes it; the first that has a value counts.
VLLM_PROMPT_KEYS = ("prompt_token_ids", "prompt")


def as_prompts(prompts: Any, *, tools: Any = None, chat_template_kwargs: Any = None) -> list[Prompt]:
    """Return a list of prompts from one prompt or a sequence of prompts.

    tools, chat_template_kwargs: arguments that the chat templates get with each prompt that does not set its own.

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
        if unknown := sorted(set(prompt) - set(CHAT_KEYS)):
            raise ValueError(f"prompts[{index}]: {unknown[0]!r}: expected {', '.join(CHAT_KEYS)}")
        try:
            arguments = template_arguments(prompt.get("tools"), prompt.get("chat_template_kwargs"))
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from None
        messages = _unwrapped(prompt["messages"])
        if not _is_sequence(messages) or not messages or not all(isinstance(each, Mapping) for each in messages):
            raise ValueError(f"prompts[{index}]: messages={messages!r:.80}: expected a list of messages")
        return _with(arguments, index, _as_prompt(index, messages))
    own = arguments_of(prompt)
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(
                f"prompts[{index}]='': expected a non-empty prompt (to start from nothing, give token ids)"
            )
        return check_plain(f"prompts[{index}]", prompt)
    if _is_sequence(prompt) and not prompt:
        raise ValueError(f"prompts[{index}]=[]: expected at least one token id or chat message")
    if _is_sequence(prompt) and len(prompt) == 1 and _is_sequence(prompt[0]) and _are_ids(prompt[0]):
        prompt = prompt[0]  # a batch of one row, as tokenizers return tensors
    if _is_sequence(prompt) and all(isinstance(item, Mapping) for item in prompt):
        try:
            messages = [as_message(message) for message in prompt]
            return Chat(messages, own) if own else messages
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from None
    if _are_ids(prompt):
        return _ids(prompt)
    raise TypeError(f"prompts[{index}]={prompt!r:.80}: expected a string, chat messages or token ids")


def _unwrapped(value: Any) -> Any:
    """Return lists in place of tensors, arrays and tokenizers' outputs. Tokens that a mask hides are left out."""
    if isinstance(value, Mapping) and "input_ids" in value:
        ids, mask = (_unwrapped(value.get(name)) for name in ("input_ids", "attention_mask"))
        if mask is None or not _is_sequence(ids):
            return ids
        if not _is_sequence(mask) or len(mask) != len(ids):
            raise ValueError(f"attention_mask={mask!r:.60}: expected the shape of input_ids")
        return list(map(_unmasked, ids, mask)) if ids and _is_sequence(ids[0]) else _unmasked(ids, mask)
    if isinstance(value, Mapping) and "role" not in value and any(name in value for name in VLLM_PROMPT_KEYS):
        if unknown := [name for name, given in value.items() if name not in VLLM_PROMPT_KEYS and given is not None]:
            raise ValueError(f"prompts: {unknown[0]!r}: expected {' or '.join(VLLM_PROMPT_KEYS)} alone")
        return _unwrapped(next((value[name] for name in VLLM_PROMPT_KEYS if value.get(name) is not None), None))
    return value.tolist() if hasattr(value, "tolist") else value


def _unmasked(ids: Sequence[int], mask: Sequence[float]) -> list[int]:
    if not _is_sequence(mask) or len(mask) != len(ids) or not all(isinstance(shown, Real) for shown in mask):
        raise ValueError(f"attention_mask={mask!r:.60}: expected the shape of input_ids")
    return [token for token, shown in zip(ids, mask) if shown]


def _begins_a_prompt(first: Any) -> bool:
    """Whether a list with this first item is one prompt: a chat, or token ids."""
    message = (
        isinstance(first, Mapping) and not {"input_ids", *VLLM_PROMPT_KEYS} & set(first) and not is_chat_object(first)
    )
    return isinstance(number(first), Integral) or message


def as_responses(responses: Any, count: int) -> list[str | list[int]]:
    """Return a list of `count` responses from one response or a sequence of responses.

    Raises:
        TypeError, ValueError: something that is no response, named by its index, or another number of responses.
    """
    if hasattr(responses, "tolist"):
        responses = responses.tolist()
    if isinstance(responses, str) or (
        _is_sequence(responses) and responses and isinstance(number(responses[0]), Integral)
    ):
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
        return check_plain(f"responses[{index}]", response)
    if _are_ids(response):
        return _ids(response)
    raise TypeError(f"responses[{index}]={response!r:.80}: expected a string or token ids")


def _are_ids(value: Any) -> bool:
    return _is_sequence(value) and all(_is_id(item) for item in value)


def _ids(items: Sequence[Any]) -> list[int]:
    return [item if type(item) is int else int(number(item)) for item in items]


def _is_id(item: Any) -> bool:
    # The usual case. Together with `_ids` this check saves 1 µs for each id of a prompt.
    if type(item) is int:
        return True
    item = number(item)
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
