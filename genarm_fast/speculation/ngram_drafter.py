"""Drafts without a model (prompt lookup): the tokens that followed the last few tokens earlier in the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genarm_fast.kernels import ngram_lookup
from genarm_fast.speculation.drafter import CapturedDrafts, DraftExecutor, Drafts, SequenceBatch, no_drafts


class NgramIndex:
    """The tokens of one sequence, prompt first, and the latest place at which each n-gram was followed by a token.

    Args:
        tokens: token ids to begin with.
        max_n, min_n: lengths of the text's ending that are looked up, the longest first.
    """

    def __init__(self, tokens: Iterable[int] = (), *, max_n: int = 4, min_n: int = 2) -> None:
        if not 1 <= min_n <= max_n:
            raise ValueError(f"min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n")
        self.lengths = range(max_n, min_n - 1, -1)
        self.tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram → index of the token after its latest such occurrence
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append accepted tokens."""
        for token in tokens:
            end = len(self.tokens)
            for n in self.lengths:
                if n <= end:
                    self._follows[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def propose(self, k: int) -> list[int]:
        """Return k tokens that may come next; [] if no ending occurred before.

        If fewer than k tokens follow that occurrence, they are repeated in a cycle.
        """
        for n in self.lengths:
            start = self._follows.get(tuple(self.tokens[-n:]))
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + i % period] for i in range(k)]
        return []


class NgramDrafter:
    """Proposes the tokens that followed the last tokens earlier, in the base's prompt or in the response."""

    names: tuple[str, ...] = ("ngram",)
    members: tuple[int, ...] = ()
    reads_texts = True

    def __init__(self, executor: DraftExecutor) -> None:
        self.executor = executor
        self.indices: WeakKeyDictionary[Any, NgramIndex] = WeakKeyDictionary()

    def propose(self, batch: SequenceBatch, most: list[int]) -> Drafts:
        device, main = self.executor.device, self.executor.main
        start = device.mark(main)
        tokens = [self._index(each).propose(count) for each, count in zip(batch.sequences, most)]
        width = max(map(len, tokens))
        if width == 0:
            return no_drafts(len(tokens), main)
        block = torch.tensor([line + [0] * (width - len(line)) for line in tokens])
        uploaded = self.executor.upload(block)
        return Drafts(uploaded, [*map(len, tokens)], main, lambda: block, marks=(start, device.mark(main)), steps=width)

    def target_logits(self, drafts: Drafts) -> dict[int, Tensor]:
        return {}

    def captures(self, sequences: list[Any], before: tuple[int, ...] | None) -> bool:
        return True

    def capture(self, batch: SequenceBatch, k: int) -> CapturedDrafts:
        drafts = ngram_lookup(*batch.texts(), k)
        return CapturedDrafts(drafts.clamp_min(0), self.executor.main, lambda: (drafts, {}))

    def accepted(self, drafts: Drafts, accepted: list[int], drafting: float, verifying: float) -> None:
        pass

    def forget(self) -> None:
        self.indices.clear()

    def guess(self, sequences: list[Any], most: int) -> list[list[int]]:
        return [self._index(sequence).propose(most) for sequence in sequences]

    def shadow(self, batch: SequenceBatch, logits: dict[int, Tensor]) -> Any:
        raise NotImplementedError("n-grams are judged by `guess`")

    def _index(self, sequence: Any) -> NgramIndex:
        prompt = sequence.request.token_ids[0]
        index = self.indices.get(sequence)
        if index is None:
            index = self.indices[sequence] = NgramIndex(prompt)
        index.extend(sequence.tokens[len(index) - len(prompt) :])
        return index
