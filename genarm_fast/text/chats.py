"""Chats with everything that their templates take besides messages: tools, and arguments such as `enable_thinking`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from genarm_fast.text.messages import Message

CHAT_KEYS = ("messages", "tools", "chat_template_kwargs")
# Arguments that the messages, the model or the call set themselves.
RESERVED_ARGUMENTS = {
    "messages", "conversation", "chat_template", "tools", "documents", "tokenize", "return_tensors", "return_dict",
    "add_generation_prompt", "continue_final_message", "tokenizer", "self", "tokenizer_kwargs",
    "padding", "truncation", "max_length", "return_assistant_tokens_mask",  # no template would see these
}  # fmt: skip


class Chat(list[Message]):
    """Messages, with the arguments that each member's chat template gets besides them, tools included."""

    def __init__(self, messages: Iterable[Message] = (), arguments: Mapping[str, Any] | None = None) -> None:
        # `dataclasses.asdict` makes copies of a list's class from the items alone, so `arguments` has a default.
        super().__init__(messages)
        self.arguments = dict(arguments or {})


def is_chat_object(value: Any) -> bool:
    """Whether a prompt is an object with messages in it, as chat APIs take it."""
    return isinstance(value, Mapping) and "messages" in value and "role" not in value


def arguments_of(prompt: Any) -> dict[str, Any]:
    """Return the arguments for a prompt's chat template, {} if it has none."""
    return prompt.arguments if isinstance(prompt, Chat) else {}


def template_arguments(tools: Any, chat_template_kwargs: Any) -> dict[str, Any]:
    """Return one dict of all that a chat template is given besides messages.

    Raises:
        TypeError, ValueError: a wrong argument; the message names the argument and what was expected.
    """
    arguments: dict[str, Any] = {}
    if chat_template_kwargs is not None:
        if not isinstance(chat_template_kwargs, Mapping):
            raise TypeError(f"chat_template_kwargs={chat_template_kwargs!r:.80}: expected a mapping")
        for name in chat_template_kwargs:
            if name in RESERVED_ARGUMENTS:
                raise ValueError(f"chat_template_kwargs={name!r}: expected what only the template knows")
        arguments |= chat_template_kwargs
    if tools is not None:
        listed = isinstance(tools, Sequence) and not isinstance(tools, (str, bytes))
        if not listed or not all(isinstance(tool, Mapping) for tool in tools):
            raise TypeError(f"tools={tools!r:.80}: expected a list of tools, each a mapping (a JSON schema)")
        if tools:
            arguments["tools"] = list(tools)
    return arguments
