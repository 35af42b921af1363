"""Drafts without a model: what followed when the last few tokens stood in the text before (prompt lookup)."""

from __future__ import annotations

from collections.abc import Iterable


class NgramIndex:
    """The tokens of one row, prompt first, and where each of their n-grams was last followed by something.

    Args:
        tokens: int ids that are there already.
        max_n, min_n: lengths of the endings that are looked up, the longest first.
    """

    def __init__(self, tokens: Iterable[int] = (), *, max_n: int = 4, min_n: int = 2) -> None:
        if not 1 <= min_n <= max_n:
            raise ValueError(f"min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n")
        self.lengths = range(max_n, min_n - 1, -1)
        self.tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram → index after its latest occurrence but the last one
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append settled tokens."""
        for token in tokens:
            end = len(self.tokens)
            for n in self.lengths:
                if n <= end:
                    self._follows[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def propose(self, k: int) -> list[int]:
        """k tokens that may come next, [] where nothing fits. A repetition that reaches the end goes on."""
        for n in self.lengths:
            start = self._follows.get(tuple(self.tokens[-n:]))
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + i % period] for i in range(k)]
        return []
