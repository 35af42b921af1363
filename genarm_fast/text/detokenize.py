"""Text from tokens as they come: no token is decoded more than a few times, no character or stop string shown half."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"  # what a decoder makes of an unfinished UTF-8 sequence
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # name of a token for one byte, as SentencePiece has them
CHARACTER = 4  # bytes of one at most, and so tokens
CONTEXT = 8  # tokens of the prompt that tell how a text goes on


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """Text of all tokens at once; special tokens are left out unless asked for."""
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list of texts for lists of lists only
    return text


def decoder(tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """`decode` of this tokenizer, for many calls: without the 25 us that transformers' own function takes around the
    one of the tokenizers library (one core of a shared EPYC), where it does no more than that."""
    kind = type(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        theirs = kind.decode is PreTrainedTokenizerBase.decode and kind._decode is PreTrainedTokenizerFast._decode
        if theirs and not {"decode", "_decode"} & vars(tokenizer).keys():
            return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    return partial(decode, tokenizer, skip_special_tokens=skip_special_tokens)


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """What one token adds to a text: its leading space is kept, and special tokens show. Bytes of a character that it
    does not complete are "\ufffd", and an id that the tokenizer does not have is ""."""
    before = tokenizer.encode("a", add_special_tokens=False)
    context = decode(tokenizer, before, skip_special_tokens=False)
    return decode(tokenizer, [*before, token_id], skip_special_tokens=False)[len(context) :]


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes | None:
    """The UTF-8 bytes that one token adds to a text: those of several tokens make a character that none of them holds.

    None where a token's text is no whole character, and its name does not tell the bytes.
    """
    text = token_text(tokenizer, token_id)
    if REPLACEMENT not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if match := BYTE.fullmatch(name):
        return bytes.fromhex(match[1])
    known = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE, as GPT-2 has it
    return bytes(known[letter] for letter in name) if known.keys() >= set(name) else None


class Detokenizer:
    """Turns tokens into text one by one, with the same result as the tokenizer's `decode` of all of them.

    before: the tokens before the first, of which the last few count: it is the text that follows theirs. Decoders of
    SentencePiece take a leading space off a whole text, and those of WordPiece write "##" before a word's rest there.

    A token's text depends on its neighbours (spaces, bytes of one character). So the last piece is decoded again
    together with the new tokens, and what they add is the new text. It is held back while it ends inside a character.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer, self._decode = tokenizer, decoder(tokenizer, skip_special_tokens=skip_special_tokens)
        self.ids = self._context(before)
        self.start, self.read = 0, len(self.ids)  # ids[start:read] is the piece before, which gives the context

    def _context(self, before: Sequence[int]) -> list[int]:
        """The last tokens before a text, as many as are whole characters; [] where they show nothing."""
        last = list(before[-CONTEXT:])
        for start in range(len(last)):
            text = self._decode(last[start:])
            if text and REPLACEMENT not in text:
                return last[start:]
        return []

    def push(self, token_id: int) -> str:
        """New text, "" while a character is unfinished."""
        self.ids.append(token_id)
        text, end = self._unread(), len(self.ids)
        if not text and token_id in self.tokenizer.all_special_ids:
            self.ids.pop()  # leaves no trace
        if text.endswith(REPLACEMENT):
            if end - self.read <= 2 * CHARACTER:
                return ""
            end -= CHARACTER  # this is no text: what cannot become a character any more is shown
            sure = self._unread(end)
            text = sure if text.startswith(sure) else ""
        if text:
            self.start, self.read = self.read, end
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        text = self._unread()
        self.start = self.read = len(self.ids)
        return text

    def _unread(self, end: int | None = None) -> str:
        context = self._decode(self.ids[self.start : self.read])
        return self._decode(self.ids[self.start : end])[len(context) :]


class StopStrings:
    """Looks for stop strings in text that comes in pieces, whatever the pieces' borders.

    The stop string that is complete first ends the text (the longest if several are complete at the same character).
    Text that may be the beginning of a stop string is held back. include: the stop string is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stops, self.include = stops, include
        self.held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Text that is safe to show; sets `found` when a stop string is complete."""
        if not self.stops:
            return piece
        text = self.held + piece
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            end, at, self.found = min(ends)
            self.held = ""
            return text[: end if self.include else at]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
