"""Changes of scores between the combination of the members and the temperature: bias, penalties, logits processors.

`logit_bias`, `min_new_tokens` and tokens that are ruled out become numbers that the kernel adds as it reads the logits.
Penalties depend on the tokens so far, and processors are Python functions: sequences with these take the slower way of
`adjusted_scores`.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genarm_fast.engine.sequence import Sequence
from genarm_fast.utils.checks import shown


def bans_stop(sequence: Sequence, length: int) -> bool:
    """Whether stop tokens are impossible after a response of `length` tokens."""
    return length < sequence.request.params.min_new_tokens


def bias_version(sequences: list[Sequence], lengths: list[int]) -> list[Any]:
    """Return a value that is equal whenever `bias_tensor` of the same sequences is equal."""
    return [bans_stop(sequence, length) for sequence, length in zip(sequences, lengths)]


def bias_tensor(sequences: list[Sequence], lengths: list[int], vocab_size: int) -> Tensor | None:
    """Return the numbers to add to combined logits, float32 [R, V] on the host; None if no sequence has any.

    lengths: tokens of each response so far.
    """
    each = [sequence.request.params for sequence in sequences]
    rows = [{**(params.logit_bias or {}), **dict.fromkeys(params.suppress_tokens, -torch.inf)} for params in each]
    for row, sequence, length in zip(rows, sequences, lengths):
        if bans_stop(sequence, length):
            row.update(dict.fromkeys((t for t in sequence.request.stop_ids if t < vocab_size), -torch.inf))
    if not any(rows) and all(params.allowed_token_ids is None for params in each):
        return None
    bias = torch.zeros(len(rows), vocab_size, dtype=torch.float32)
    for r, (row, params) in enumerate(zip(rows, each)):
        if params.allowed_token_ids is not None:
            bias[r] = -torch.inf
            bias[r, list(params.allowed_token_ids)] = 0.0
        bias[r, list(row)] += torch.tensor(list(row.values()), dtype=torch.float32)
    return bias


class SeenTokens:
    """The tokens of each sequence in the form that penalties and processors need. A step adds its new tokens alone."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._known: WeakKeyDictionary[Sequence, tuple[Tensor, int]] = WeakKeyDictionary()
        self._ids: WeakKeyDictionary[Sequence, tuple[Tensor, int]] = WeakKeyDictionary()

    def ids(self, sequence: Sequence, drafted: list[int], device: torch.device) -> Tensor:
        """Return prompt, response and `drafted` tokens as the base sees them: a new tensor, int64 [1, n]."""
        prompt = sequence.request.token_ids[0]
        if sequence not in self._ids:
            new = torch.empty(len(prompt) + sequence.request.params.max_new_tokens, dtype=torch.int64, device=device)
            new[: len(prompt)] = torch.tensor(prompt)
            self._ids[sequence] = new, 0
        ids, known = self._ids[sequence]
        news = torch.tensor([*sequence.tokens[known:], *drafted], dtype=torch.int64)
        start = len(prompt) + known
        ids[start : start + len(news)] = news
        self._ids[sequence] = ids, len(sequence.tokens)
        return ids[: start + len(news)].clone()[None]

    def counts(self, sequence: Sequence, drafted: list[int], device: torch.device) -> Tensor:
        """Return how often each token is in the response, and in prompt and response together, float32 [2, V].

        drafted: tokens that count as part of the response.
        """
        if sequence not in self._known:
            new = torch.zeros(2, self.vocab_size, dtype=torch.float32, device=device)
            self._count(new[1:], sequence.request.token_ids[0])
            self._known[sequence] = new, 0
        counts, known = self._known[sequence]
        self._count(counts, sequence.tokens[known:])
        self._known[sequence] = counts, len(sequence.tokens)
        if drafted:
            counts = counts.clone()
            self._count(counts, drafted)
        return counts

    def _count(self, counts: Tensor, tokens: list[int]) -> None:
        known = torch.tensor([token for token in tokens if token < self.vocab_size], dtype=torch.int64)
        if len(known):
            counts += torch.bincount(known, minlength=self.vocab_size).to(counts.device)


def adjusted_scores(
    sequences: list[Sequence], drafted: list[list[int]], scores: Tensor, bias: Tensor | None, seen: SeenTokens
) -> Tensor:
    """Return log-probabilities, float32 [R, V], after penalties, bias and processors.

    drafted: for each sequence, the tokens that precede this position and are not in its text yet. A sequence whose
    processor fails gets its `error` set; the others go on.
    """
    if any(sequence.request.penalised for sequence in sequences):
        params = [sequence.request.params for sequence in sequences]
        counts = [seen.counts(each, tokens, scores.device) for each, tokens in zip(sequences, drafted)]
        generated, everywhere = torch.stack(counts, dim=1)
        penalties = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        repetition, frequency, presence = torch.tensor(penalties, dtype=torch.float32).to(scores).T[..., None]
        scores = torch.where(everywhere > 0, scores * repetition, scores)  # log-probabilities are never positive
        scores = scores - frequency * generated - presence * (generated > 0)
    if bias is not None:
        scores = scores + bias
    stages = max(len(sequence.request.params.logits_processors) for sequence in sequences)
    for stage in range(stages):
        rows = list(scores.unbind(0))
        for r, sequence in enumerate(sequences):
            processors = sequence.request.params.logits_processors
            if stage < len(processors) and sequence.error is None:
                try:
                    rows[r] = _processed(
                        processors[stage], sequence, seen.ids(sequence, drafted[r], scores.device), scores[r]
                    )
                except BaseException as error:  # an error in a processor fails its own request; the others go on
                    if isinstance(error, (KeyboardInterrupt, SystemExit)) and in_main_thread():
                        raise  # a signal's handler raised it, not the processor
                    sequence.error = error if isinstance(error, Exception) else _as_failure(processors[stage], error)
        scores = torch.stack(rows)
        broken = (scores.isnan() | (scores == torch.inf)).any(-1).tolist()  # one read for all sequences
        for sequence, bad in zip(sequences, broken):
            processors = sequence.request.params.logits_processors
            if bad and sequence.error is None and stage < len(processors):
                sequence.error = ValueError(
                    f"logits_processors: {processors[stage]!r} returned NaN or +inf, expected finite scores or -inf"
                )
    return scores


def in_main_thread() -> bool:
    """Whether this is the main thread, in which Python runs the handlers of signals."""
    return threading.current_thread() is threading.main_thread()


def _as_failure(processor: Any, error: BaseException) -> RuntimeError:
    """Return a RuntimeError for a processor that raised an error that would end a task or the process elsewhere."""
    failure = RuntimeError(f"logits_processors: {processor!r} raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _processed(processor: Any, sequence: Sequence, ids: Tensor, scores: Tensor) -> Tensor:
    """Return the scores [V] that a caller's processor makes of these. Raises ValueError if they have another form."""
    changed = sequence.context.run(processor, ids, scores.clone()[None])
    if not isinstance(changed, Tensor) or changed.shape != (1, len(scores)) or not changed.is_floating_point():
        found = f"{tuple(changed.shape)}" if isinstance(changed, Tensor) else shown(changed)
        if isinstance(changed, Tensor) and not changed.is_floating_point():  # for example a mask, or token ids
            found += f" of {changed.dtype}"
        raise ValueError(
            f"logits_processors: {processor!r} returned {found}, expected scores of shape (1, {len(scores)})"
        )
    return changed[0].to(device=scores.device, dtype=scores.dtype)
