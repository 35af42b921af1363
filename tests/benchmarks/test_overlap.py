"""benchmarks/overlap.py: its tokens per step equal a simulation's, and docs/gpu.md has its table."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"


class Texts:
    """A target and an ARM. After a right text the ARM knows the next token with probability `a`, after a wrong one
    never."""

    def __init__(self, a):
        self.a, self.text, self.known = a, [], []
        self.random = Random(1)

    def right(self, place):
        """Whether the ARM's token at a place is the target's, given the target's text before it."""
        while len(self.known) <= place:
            self.known.append(self.random.random() < self.a)
        return self.known[place]


def simulated(a, k, *, overlapped, steps=40_000):
    """Return the tokens per step, simulated token by token.

    `block` is where the drafts at hand begin; None if they follow a wrong text.
    """
    texts, place, block = Texts(a), 0, 0
    for _ in range(steps):
        accepted = 0
        if block == place:
            while accepted < k and texts.right(place + accepted):
                accepted += 1
        end = place + accepted + 1  # one target token more, which follows the accepted drafts
        if not overlapped:
            block = end
        elif block == place:
            # The ARM continued from its own drafts, and from its guess of the bonus token.
            block = end if accepted == k and texts.right(end - 1) else None
        else:
            # The ARM knew the text before `place` when it began to draft, and guessed the token at `place`.
            block = end if texts.right(place) else None
        place = end
    return place / steps


@pytest.mark.parametrize("a", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("k", [1, 4, 6])
def test_tokens_of_a_step_are_those_of_a_simulation(script, a, k):
    module = script("overlap")
    assert simulated(a, k, overlapped=False) == pytest.approx(module.settled(a, k), rel=0.015)
    assert simulated(a, k, overlapped=True) == pytest.approx(module.settled_overlapped(a, k), rel=0.015)


def test_known_numbers(script):
    """At acceptance 0.8 with 4 drafts, steps settle 3.36 tokens in turn and 2.28 overlapped."""
    module = script("overlap")
    assert module.settled(0.8, 4) == pytest.approx(1 + 0.8 + 0.64 + 0.512 + 0.4096)
    assert module.settled_overlapped(0.8, 4) == pytest.approx(2.283, abs=1e-3)
    assert module.verifying(3) == module.BASE[4]
    assert module.verifying(5) == pytest.approx((module.BASE[4] + module.BASE[8]) / 2)
    in_turn = module.PLANS["one GPU, in turn"]
    assert in_turn.milliseconds(0.8, 4) == pytest.approx(4 * 1.34 + 6.2375 + 0.7)
    assert all(plan.best(0.0) == 1 for plan in module.PLANS.values())


def test_the_docs_have_its_table(script):
    missing = [line for line in script("overlap").table() if line not in DOCS.read_text()]
    assert not missing
