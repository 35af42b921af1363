"""Shadow evaluation: judging drafters whose turn it is not by the tokens that a step gives anyway."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from genarm_fast.speculation.drafter import Drafter, SequenceBatch

Judge = Callable[[Sequence[Sequence[int]]], None]


class TextShadows:
    """What drafters that read text alone would have proposed, until `judge` is told what came instead."""

    def __init__(self, policy: Any, drafters: list[Drafter], sequences: list[Any], turn: int | None) -> None:
        self.policy, self.sequences = policy, list(sequences)
        self.lengths = [len(sequence.tokens) for sequence in sequences]
        self.guesses = {
            i: guess
            for i in policy.candidates
            if i != turn and (guess := drafters[i].guess(self.sequences, policy.most)) is not None
        }

    def judge(self) -> None:
        """Compare with the tokens that the sequences have now."""
        news = [sequence.tokens[length:] for sequence, length in zip(self.sequences, self.lengths)]
        for i, guess in self.guesses.items():
            self.policy.observe_shadow(i, guess, news)


def shadow_drafters(policy: Any, drafters: list[Drafter], members: Collection[int], turn: int | None) -> list[int]:
    """Candidates that are to be judged by the logits of these members, which a step has anyway."""
    due = policy.shadow_due()
    return [i for i in due if i != turn and drafters[i].members and set(drafters[i].members) <= set(members)]


def judge_of_first(policy: Any, shadows: list[int], read: Callable[[], Tensor]) -> Judge:
    """A judge of these candidates by the first token of each, [R, S], which the host has once the step is over."""

    def judge(accepted: Sequence[Sequence[int]]) -> None:
        for n, i in enumerate(shadows):
            policy.observe_shadow(i, read()[:, n : n + 1].tolist(), accepted)

    return judge


def model_shadows(
    policy: Any, drafters: list[Drafter], batch: SequenceBatch, logits: dict[int, Tensor], turn: int | None
) -> Judge:
    """Let members propose the next token from logits at hand; call the result with the tokens that were accepted.

    logits: of every member that runs, [R, q, V]. turn: the drafter of this step, whose members' forwards say nothing of
    what one draft takes, as they are of several tokens.
    """
    shadows = [(i, drafters[i].shadow(batch, logits)) for i in shadow_drafters(policy, drafters, logits.keys(), turn)]

    def judge(accepted: Sequence[Sequence[int]]) -> None:
        for i, found in shadows:
            guesses, seconds = found()
            policy.observe_shadow(i, guesses, accepted, seconds if turn is None else None)

    return judge
