"""Chat messages as chat APIs and data sets have them, made into what templates take, and nothing of them lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
PAYLOAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # what may stand for a content


class UnsupportedContent(ValueError):
    """A message is well-formed, but holds what no text can."""


def as_message(value: Any) -> Message:
    """A message with all of its keys but those that are None; text parts become one string.

    Raises:
        TypeError, ValueError: no message, or one without content.
        UnsupportedContent: a part that is not text.
    """
    if not isinstance(value, Mapping) or "role" not in value:
        raise ValueError(f"message {value!r:.80}: expected the keys 'role' and 'content'")
    if not isinstance(value["role"], str):
        raise TypeError(f"message {value!r:.80}: expected a string as 'role'")
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    content = message.get("content")
    if content is None and "content" in value and not any(message.get(name) for name in PAYLOAD):
        raise TypeError(f"message {value!r:.80}: expected a string as 'content'")
    if content is None and not any(message.get(name) for name in PAYLOAD):
        raise ValueError(f"message {value!r:.80}: expected the keys 'role' and 'content'")
    if content is not None and not isinstance(content, str):
        content = _joined(value, content)
    for text in (value["role"], content or ""):
        check_text("message", text)
    return {**message, "content": content}


def check_text(name: str, text: str) -> str:
    """The text. Raises ValueError for half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r:.80}: expected Unicode text, got {text[error.start]!r} in it") from None
    return text


def _joined(message: Any, parts: Any) -> str:
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise TypeError(f"message {message!r:.80}: expected a string or a list of parts as 'content'")
    texts = []
    for part in parts:
        kind = part.get("type") or "text"
        if kind != "text":
            raise UnsupportedContent(f"a content part of type {kind!r}: expected text parts")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {message!r:.80}: expected a string as 'text' of a part")
        texts.append(part["text"])
    return "".join(texts)
