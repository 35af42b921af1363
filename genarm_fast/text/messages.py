"""Read chat messages in the forms of chat APIs and data sets. The templates get every key of a message."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
# Keys that may take the place of a content.
CONTENT_ALTERNATIVES = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

TEXT_PART_KEYS = ("type", "text", "annotations", "cache_control")  # keys of a part that is only text
SHAREGPT = ("system", "human", "gpt", "user", "assistant", "tool", "function_call", "observation")
_STORED = re.compile(r"""\s*\[?\s*\{\s*["']""")  # beginnings of texts that may be messages


class UnsupportedContent(ValueError):
    """A message is well-formed, but holds something that no text can hold."""


def as_message(value: Any) -> Message:
    """Return a message with all of its keys except those that are None. Its text parts become one string.

    Raises:
        TypeError, ValueError: something that is no message, or a message without content.
        UnsupportedContent: a part that is not text.
    """
    if not isinstance(value, Mapping) or "role" not in value:
        raise ValueError(f"message {value!r:.80}: expected the keys 'role' and 'content'")
    if not isinstance(value["role"], str):
        raise TypeError(f"message {value!r:.80}: expected a string as 'role'")
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    calls = message.get("tool_calls", ())
    if not isinstance(calls, (list, tuple)) or any(isinstance(call, (str, bytes)) for call in calls):
        raise TypeError(f"message {value!r:.80}: expected a list of calls as 'tool_calls', got {calls!r:.60}")
    content = message.get("content")
    if content is None and "content" in value and not any(message.get(name) for name in CONTENT_ALTERNATIVES):
        raise TypeError(f"message {value!r:.80}: expected a string as 'content'")
    if content is None and not any(message.get(name) for name in CONTENT_ALTERNATIVES):
        raise ValueError(f"message {value!r:.80}: expected the keys 'role' and 'content'")
    if content is not None and not isinstance(content, str):
        content = _joined(value, content)
    for text in (value["role"], content or ""):
        check_text("message", text)
    return {**message, "content": content}


def check_text(name: str, text: str) -> str:
    """Return the text. Raises ValueError for half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r:.80}: expected Unicode text, got {text[error.start]!r} in it") from None
    return text


def stored_messages(text: str) -> list[Any] | None:
    """Return the messages that a text consists of, as JSON or as Python prints them; None for any other text.

    Tables without types (CSV, SQL) hold messages in this form.

    Raises:
        ValueError: messages that cannot be read, since NumPy has printed them.
    """
    if not _STORED.match(text):
        return None
    for read in (json.loads, _literal):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            if isinstance(value, Mapping):
                value = value["messages"] if set(value) == {"messages"} else [value]
            return value if isinstance(value, list) and value and all(map(_is_message, value)) else None
    if text.rstrip().endswith("}]") and "'role': '" in text:
        raise ValueError(f"{text!r:.60}: expected messages as a list or as JSON, NumPy printed these without commas")
    return None


def check_plain(name: str, text: str) -> str:
    """Return the text, as `check_text`. Raises ValueError also for messages in the place of a text."""
    messages = True
    with suppress(ValueError):
        messages = stored_messages(text) is not None
    if messages:
        raise ValueError(
            f"{name}={text!r:.60}: expected a text, or messages as a list, not as the JSON or Python text of one "
            "(json.loads and ast.literal_eval read it). If that text itself is meant, give its token ids"
        )
    return check_text(name, text)


def may_be_stored(text: str) -> bool:
    """Whether a text begins like stored messages; takes a tenth of a microsecond."""
    return _STORED.match(text) is not None


def _literal(text: str) -> Any:
    with warnings.catch_warnings():  # Python warns of unknown escapes in the text
        warnings.simplefilter("ignore")
        return ast.literal_eval(text.strip())


def _is_message(value: Any) -> bool:
    """Whether a value is a message, or a request with messages in it.

    Messages with the keys `from` and `value` count too; they are refused by name later.
    """
    if not isinstance(value, Mapping):
        return False
    if isinstance(value.get("role"), str):
        return "content" in value or any(name in value for name in CONTENT_ALTERNATIVES)
    inside = value.get("messages")
    if isinstance(inside, list):
        return any(map(_is_message, inside))
    return "value" in value and value.get("from") in SHAREGPT


def _joined(message: Any, parts: Any) -> str:
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise TypeError(f"message {message!r:.80}: expected a string or a list of parts as 'content'")
    texts = []
    for part in parts:
        kind = part.get("type") or "text"
        if kind != "text":
            raise UnsupportedContent(f"a content part of type {kind!r}: expected text parts")
        if others := [name for name, value in part.items() if name not in TEXT_PART_KEYS and value is not None]:
            raise UnsupportedContent(f"a content part with {others[0]!r}: expected text parts")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {message!r:.80}: expected a string as 'text' of a part")
        texts.append(part["text"])
    return "".join(texts)
