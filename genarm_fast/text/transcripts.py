"""Transcripts as in the HH-RLHF data: one text for a conversation, with "Human:" or "Assistant:" before each turn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from genarm_fast.text.messages import Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {"user": HUMAN, "assistant": ASSISTANT}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def standard(text: str) -> str:
    """Restore the line breaks before a transcript's first turn, if they are missing. Other texts do not change."""
    stripped = text.lstrip()
    return "\n\n" + stripped if stripped.startswith(HUMAN.lstrip()) and not text.startswith(HUMAN) else text


def is_transcript(text: str) -> bool:
    """Whether a prompt is a transcript: a human speaks in it, and it ends where the assistant begins."""
    text = standard(text)
    return HUMAN in text and text.rstrip().endswith(ASSISTANT.strip())


def transcript_messages(prompt: str) -> list[Message]:
    """Return the chat messages of a transcript that ends with an open assistant turn; [] for any other text.

    Text before the first turn becomes a system message.
    """
    if not is_transcript(prompt):
        return []
    before, *turns = _TURN.split(standard(prompt).rstrip())
    messages: list[Message] = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, text in zip(turns[::2], turns[1::2]):
        messages.append({"role": "user" if speaker == "Human" else "assistant", "content": text.strip()})
    return messages[:-1]


def as_transcript(prompt: str | Sequence[Message]) -> str:
    """Return the prompt as a transcript that ends where the assistant goes on. A text becomes one human turn.

    Raises:
        ValueError: messages of roles that a transcript has no turns for.
    """
    if isinstance(prompt, str):
        return standard(prompt) if is_transcript(prompt) else f"{HUMAN} {prompt}{ASSISTANT}"
    text = ""
    for message in prompt:
        if message["role"] not in SPEAKERS or set(message) > {"role", "content"}:
            raise ValueError(f"a message of the role {message['role']!r}: expected user and assistant, text alone")
        text += f"{SPEAKERS[message['role']]} {message['content']}"
    return text if prompt[-1]["role"] == "assistant" else text + ASSISTANT
