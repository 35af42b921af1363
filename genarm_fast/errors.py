"""Errors that carry more than a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genarm_fast.outputs import GenerationOutput


def said(error: BaseException | None) -> str:
    """An error's text; with its type where that says nothing by itself, as that of a failed `assert` or a KeyError."""
    text = str(error)
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__}: {text}".removesuffix(": ")


class GenerationError(RuntimeError):
    """Some requests failed while generating; the others finished.

    outputs: one entry per prompt in order, None where the request failed.
    """

    def __init__(self, message: str, outputs: list[GenerationOutput | None]) -> None:
        super().__init__(message)
        self.outputs = outputs
