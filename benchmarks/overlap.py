"""Whether drafting the next block beside the verification of this one pays: a computation from an H100's figures.

    python benchmarks/overlap.py

A step verifies K drafts and the token before them. The acceptance a is the probability that a draft after a right text
is right. Three ways to draft:

- *in turn*: K drafts, then their verification. Beside it the drafter feeds its last draft, for the bonus token.
- *overlapped*: while block n is verified, the drafter goes on from its own last draft: one for the bonus token, then
  block n + 1. That stands only if all K drafts and the bonus token were right; else its verification settles one token.
  After that step the block is right from the start if the drafter's token for that one place was.
- *overlapped, or anew*: the same, but a block that does not stand is drafted again, in turn.

Both models read their weights from one memory on one GPU, so drafts beside a verification are not free there: the step
takes as long as reading the base once and the ARM K + 1 times. Two shares of the read speed are tried: 82 %, which base
and ARM reached on two streams, and 92 %, which the largest product alone reached. Tokens for each step are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

# One H100, 8B base and 1B ARM, bfloat16, 2026-11-27 (docs/gpu.md), ms.
BASE = {1: 6.14, 2: 6.18, 4: 6.22, 8: 6.29}  # the base over so many tokens of a request
ARM = 1.34  # a forward of the ARM by itself
BOTH = 6.84  # the base over one token and the ARM, on two streams
READ_BASE, READ_BOTH = 4.82, 5.6  # all their weights at the measured read speed; the first is W
ON_STREAMS, BEST = READ_BOTH / BOTH, 0.92  # shares of the read speed: of two streams, of the largest product alone
MOST = 6  # drafts
ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Plan(NamedTuple):
    """tokens: that a step settles, of acceptance and K. milliseconds: that it takes, of the same."""

    tokens: Callable[[float, int], float]
    milliseconds: Callable[[float, int], float]

    def token(self, a: float, k: int) -> float:
        """Milliseconds a token."""
        return self.milliseconds(a, k) / self.tokens(a, k)

    def best(self, a: float) -> int:
        """The K at which a token is cheapest."""
        return min(range(1, MOST + 1), key=lambda k: self.token(a, k))


def settled(a: float, k: int) -> float:
    """Tokens of a step whose block stands: drafts up to the first wrong one, and one target more."""
    return sum(a**i for i in range(k + 1))


def standing(a: float, k: int) -> float:
    """The share of overlapped steps whose block stands: it goes on with a^(k + 1), and comes back with a."""
    return a / (a + 1 - a ** (k + 1))


def settled_overlapped(a: float, k: int) -> float:
    return standing(a, k) * settled(a, k) + 1 - standing(a, k)


def verifying(k: int) -> float:
    """The base over K + 1 tokens, ms, between the numbers that were measured."""
    low, high = max(q for q in BASE if q <= k + 1), min(q for q in BASE if q >= k + 1)
    return BASE[low] + (BASE[high] - BASE[low]) * (k + 1 - low) / max(high - low, 1)


def in_turn(a: float, k: int, beside: float) -> float:
    """beside: what the drafter's last feed adds to the verification, ms."""
    return k * ARM + verifying(k) + beside


def overlapped(a: float, k: int, share: float) -> float:
    """On one GPU, at this share of the read speed."""
    return max(verifying(k), (READ_BASE + (k + 1) * (READ_BOTH - READ_BASE)) / share)


def overlapped_on_two(a: float, k: int) -> float:
    """The ARM has a GPU of its own; what crosses between them is not counted."""
    return max(verifying(k), (k + 1) * ARM)


def or_anew(step: Callable[[float, int], float], a: float, k: int) -> float:
    return step(a, k) + (1 - a ** (k + 1)) * k * ARM


ON_ONE = {share: partial(overlapped, share=share) for share in (ON_STREAMS, BEST)}
PLANS = {
    "one GPU, in turn": Plan(settled, partial(in_turn, beside=BOTH - BASE[1])),
    **{f"overlapped, {share:.0%}": Plan(settled_overlapped, step) for share, step in ON_ONE.items()},
    **{f"or anew, {share:.0%}": Plan(settled, partial(or_anew, step)) for share, step in ON_ONE.items()},
    "two GPUs, in turn": Plan(settled, partial(in_turn, beside=0.0)),
    "two, overlapped": Plan(settled_overlapped, overlapped_on_two),
    "two, or anew": Plan(settled, partial(or_anew, overlapped_on_two)),
}


def table() -> Iterator[str]:
    """W a token of each plan at its best K, in Markdown."""
    yield "| " + " | ".join(["acceptance", *PLANS]) + " |"
    yield "|---" * (1 + len(PLANS)) + "|"
    for a in ACCEPTANCES:
        best = ((plan.token(a, plan.best(a)) / READ_BASE, plan.best(a)) for plan in PLANS.values())
        yield f"| {a} | " + " | ".join(f"{w:.2f}, K = {k}" for w, k in best) + " |"


if __name__ == "__main__":
    print("W a token, and the K from 1 to 6 at which it is least\n")
    print(*table(), sep="\n")
