"""Shadow evaluation: drafters that do not draft in a step are judged by the tokens that the step draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from genarm_fast.speculation.drafter import Drafter, SequenceBatch

Judge = Callable[[Sequence[Sequence[int]]], None]


class TextShadows:
    """Drafts that drafters of text alone would have made in a step, until `judge` compares them with its tokens."""

    def __init__(self, policy: Any, drafters: list[Drafter], sequences: list[Any], step_drafter: int | None) -> None:
        self.policy, self.sequences = policy, list(sequences)
        self.lengths = [len(sequence.tokens) for sequence in sequences]
        self.guesses = {
            i: guess
            for i in policy.tuner_candidates
            if i != step_drafter and (guess := drafters[i].guess(self.sequences, policy.max_drafts)) is not None
        }

    def judge(self) -> None:
        """Compare the drafts with the tokens that the sequences have now."""
        news = [sequence.tokens[length:] for sequence, length in zip(self.sequences, self.lengths)]
        for i, guess in self.guesses.items():
            self.policy.observe_shadow(i, guess, news)


def shadow_drafters(
    policy: Any, drafters: list[Drafter], members: Collection[int], step_drafter: int | None
) -> list[int]:
    """Return the candidates to judge in this step by the logits of `members`, which the step computes anyway."""
    due = policy.shadow_due()
    return [i for i in due if i != step_drafter and drafters[i].members and set(drafters[i].members) <= set(members)]


def judge_of_first(policy: Any, shadows: list[int], read: Callable[[], Tensor]) -> Judge:
    """Return a judge of these candidates by the first draft of each.

    read: returns these drafts, [R, S] on the host, once the step is over.
    """

    def judge(accepted: Sequence[Sequence[int]]) -> None:
        for n, i in enumerate(shadows):
            policy.observe_shadow(i, read()[:, n : n + 1].tolist(), accepted)

    return judge


def model_shadows(
    policy: Any, drafters: list[Drafter], batch: SequenceBatch, logits: dict[int, Tensor], step_drafter: int | None
) -> Judge:
    """Draw the next token that members would propose from a step's logits. Returns a judge to call with its tokens.

    logits: logits of every running member, [R, q, V]. step_drafter: the drafter of this step, or None. With a drafter,
    forwards have several tokens, so their times do not show the cost of one draft.
    """
    shadows = [
        (i, drafters[i].shadow(batch, logits)) for i in shadow_drafters(policy, drafters, logits.keys(), step_drafter)
    ]

    def judge(accepted: Sequence[Sequence[int]]) -> None:
        for i, found in shadows:
            guesses, seconds = found()
            policy.observe_shadow(i, guesses, accepted, seconds if step_drafter is None else None)

    return judge
