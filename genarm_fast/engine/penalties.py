"""What changes scores between the combination of the members and the temperature.

`logit_bias` and `min_new_tokens` are numbers that the kernel adds while it reads the logits. A repetition penalty needs
normalised log-probabilities, and processors are Python: their sequences take the slower way of `adjusted_scores`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genarm_fast.engine.sequence import Sequence


def needs_host(sequence: Sequence) -> bool:
    """Whether its next token depends on tokens that the host has to know first."""
    params = sequence.request.params
    return bool(params.repetition_penalty != 1.0 or params.logits_processors)


def bans_stop(sequence: Sequence, length: int) -> bool:
    """Whether stop tokens are impossible after a response of `length` tokens."""
    return length < sequence.request.params.min_new_tokens


def bias_version(sequences: list[Sequence], lengths: list[int]) -> list[Any]:
    """Equal for equal biases of the same sequences."""
    return [bans_stop(sequence, length) for sequence, length in zip(sequences, lengths)]


def bias_tensor(sequences: list[Sequence], lengths: list[int], vocab_size: int) -> Tensor | None:
    """Numbers to add to combined logits, float32 [R, V] on the host; None where no sequence asks for any.

    lengths: tokens of each response so far.
    """
    rows = [dict(sequence.request.params.logit_bias or {}) for sequence in sequences]
    for row, sequence, length in zip(rows, sequences, lengths):
        if bans_stop(sequence, length):
            row.update(dict.fromkeys((t for t in sequence.request.stop_ids if t < vocab_size), -torch.inf))
    if not any(rows):
        return None
    bias = torch.zeros(len(rows), vocab_size)
    for r, row in enumerate(rows):
        bias[r, list(row)] = torch.tensor(list(row.values()))
    return bias


class SeenTokens:
    """Which tokens each sequence has in its prompt or response, kept from step to step."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._known: WeakKeyDictionary[Sequence, tuple[Tensor, int]] = WeakKeyDictionary()

    def mask(self, sequence: Sequence, drafted: list[int], device: torch.device) -> Tensor:
        """bool [V], with `drafted` tokens that may follow."""
        prompt = sequence.request.token_ids[0]
        mask, count = self._known.get(sequence, (torch.zeros(self.vocab_size, dtype=torch.bool, device=device), 0))
        total = len(prompt) + len(sequence.tokens)
        self._mark(mask, sequence.text_of(0, count, total))
        self._known[sequence] = mask, total
        if drafted:
            mask = mask.clone()
            self._mark(mask, drafted)
        return mask

    def _mark(self, mask: Tensor, tokens: list[int]) -> None:
        known = [token for token in tokens if token < self.vocab_size]
        if known:
            mask[torch.tensor(known).to(mask.device)] = True


def adjusted_scores(
    sequences: list[Sequence], drafted: list[list[int]], scores: Tensor, bias: Tensor | None, seen: SeenTokens
) -> Tensor:
    """Repetition penalty, bias, processors on log-probabilities float32 [R, V] after the drafted tokens.

    A sequence whose processor fails gets its `error` set; the others go on.
    """
    penalties = [sequence.request.params.repetition_penalty for sequence in sequences]
    if any(penalty != 1.0 for penalty in penalties):
        masks = torch.stack([seen.mask(each, tokens, scores.device) for each, tokens in zip(sequences, drafted)])
        factors = torch.tensor(penalties, dtype=scores.dtype).to(scores.device)[:, None]
        scores = torch.where(masks, scores * factors, scores)  # log-probabilities are never positive
    if bias is not None:
        scores = scores + bias
    stages = max(len(sequence.request.params.logits_processors) for sequence in sequences)
    for stage in range(stages):
        rows = list(scores.unbind(0))
        for r, sequence in enumerate(sequences):
            processors = sequence.request.params.logits_processors
            if stage < len(processors) and sequence.error is None:
                try:
                    rows[r] = _processed(processors[stage], sequence, drafted[r], scores[r].clone())
                except Exception as error:  # a caller's processor: its request fails, the others go on
                    sequence.error = error
        scores = torch.stack(rows)
        broken = (scores.isnan() | (scores == torch.inf)).any(-1).tolist()  # one read for all sequences
        for sequence, bad in zip(sequences, broken):
            processors = sequence.request.params.logits_processors
            if bad and sequence.error is None and stage < len(processors):
                sequence.error = ValueError(
                    f"logits_processors: {processors[stage]!r} returned NaN or +inf, expected finite scores or -inf"
                )
    return scores


def _processed(processor: Any, sequence: Sequence, drafted: list[int], scores: Tensor) -> Tensor:
    """What a caller's processor makes of scores [V]."""
    seen = torch.tensor([[*sequence.request.token_ids[0], *sequence.tokens, *drafted]]).to(scores.device)
    changed = processor(seen, scores[None])
    if not isinstance(changed, Tensor) or changed.shape != (1, len(scores)):
        shape = tuple(changed.shape) if isinstance(changed, Tensor) else changed
        raise ValueError(
            f"logits_processors: {processor!r} returned {shape!r}, expected scores of shape (1, {len(scores)})"
        )
    return changed[0].to(device=scores.device, dtype=scores.dtype)
