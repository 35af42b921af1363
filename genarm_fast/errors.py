"""Errors that carry more than a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genarm_fast.outputs import GenerationOutput


def error_text(error: BaseException | None) -> str:
    """Return an error's text, after its type where the text says little alone: a failed `assert`, or a KeyError."""
    text = str(error)
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__}: {text}".removesuffix(": ")


class GenerationError(RuntimeError):
    """Error raised when some requests failed while generating and the others finished.

    outputs: one entry per prompt in order, None where the request failed.
    """

    def __init__(self, message: str, outputs: list[GenerationOutput | None]) -> None:
        super().__init__(message)
        self.outputs = outputs
