"""Turn tokens into text as they arrive. No token is decoded often, and no character or stop string is shown in part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"  # text of an unfinished UTF-8 sequence
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # name of a token for one byte in SentencePiece's vocabularies
MAX_CHARACTER_BYTES = 4  # most bytes of a UTF-8 character, so most tokens of one as well
CONTEXT_TOKENS = 8  # tokens of the prompt that decide how a text continues


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of all tokens at once. Special tokens are left out unless asked for."""
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # decode returns a list of texts only for lists of lists
    return text


def decoder(tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """Return `decode` for this tokenizer, made for many calls.

    transformers' own function takes 25 µs more than the one of the tokenizers library (one core of a shared EPYC). The
    library's function is called directly if transformers' function does nothing else.
    """
    kind = type(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        theirs = kind.decode is PreTrainedTokenizerBase.decode and kind._decode is PreTrainedTokenizerFast._decode
        if theirs and not {"decode", "_decode"} & vars(tokenizer).keys():
            return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    return partial(decode, tokenizer, skip_special_tokens=skip_special_tokens)


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Return what one token adds to a text. Its leading space is kept, and special tokens show.

    Bytes of a character that the token does not complete are "\ufffd". An id that the tokenizer does not have gives "".
    """
    before = tokenizer.encode("a", add_special_tokens=False)
    context = decode(tokenizer, before, skip_special_tokens=False)
    return decode(tokenizer, [*before, token_id], skip_special_tokens=False)[len(context) :]


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes | None:
    """Return the UTF-8 bytes that one token adds to a text. The bytes of several tokens may form one character.

    Returns None if the token's text is not made of whole characters, and the token's name does not tell its bytes.
    """
    text = token_text(tokenizer, token_id)
    if REPLACEMENT not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if match := BYTE.fullmatch(name):
        return bytes.fromhex(match[1])
    # Byte-level BPE spells each byte as one letter of GPT-2's table.
    known = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(known[letter] for letter in name) if known.keys() >= set(name) else None


class Detokenizer:
    """Turns tokens into text one by one, with the same result as the tokenizer's `decode` of all tokens at once.

    before: the tokens before the first one, of which only the last few matter. SentencePiece decoders remove a leading
    space from a whole text, and WordPiece decoders write "##" before the rest of a word there.

    A token's text depends on its neighbours (spaces, bytes of one character). So the last piece is decoded again
    together with the new tokens, and the text beyond the last piece is new. New text that ends inside a character is
    held back.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer, self._decode = tokenizer, decoder(tokenizer, skip_special_tokens=skip_special_tokens)
        self.ids = self._context(before)
        self.start, self.read = 0, len(self.ids)  # ids[start:read] is the previous piece, which gives the context

    def _context(self, before: Sequence[int]) -> list[int]:
        """Return the last tokens before a text, as many as form whole characters; [] if none of them shows anything."""
        last = list(before[-CONTEXT_TOKENS:])
        for start in range(len(last)):
            text = self._decode(last[start:])
            if text and REPLACEMENT not in text:
                return last[start:]
        return []

    def push(self, token_id: int) -> str:
        """Add a token and return the new text; "" while a character is unfinished."""
        self.ids.append(token_id)
        text, end = self._unread(), len(self.ids)
        if not text and token_id in self.tokenizer.all_special_ids:
            # A special token that shows nothing has no influence on later text.
            self.ids.pop()
        if text.endswith(REPLACEMENT):
            if end - self.read <= 2 * MAX_CHARACTER_BYTES:
                return ""
            # The last bytes are no text. Those that can no longer become a character are shown.
            end -= MAX_CHARACTER_BYTES
            sure = self._unread(end)
            text = sure if text.startswith(sure) else ""
        if text:
            self.start, self.read = self.read, end
        return text

    def flush(self) -> str:
        """Return the text that is still held back, at the end of the text."""
        text = self._unread()
        self.start = self.read = len(self.ids)
        return text

    def _unread(self, end: int | None = None) -> str:
        context = self._decode(self.ids[self.start : self.read])
        return self._decode(self.ids[self.start : end])[len(context) :]


class StopStrings:
    """Looks for stop strings in text that arrives in pieces, wherever the pieces begin and end.

    The stop string that is complete first ends the text (the longest if several are complete at the same character).
    Text that may be the beginning of a stop string is held back. include: whether the stop string is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stops, self.include = stops, include
        self.held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Return the text that is safe to show. Sets `found` when a stop string is complete."""
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
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
