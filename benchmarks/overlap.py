"""Computes from an H100's figures whether it pays to draft the next block while this one is verified.

    python benchmarks/overlap.py

A step verifies K drafts and the token before them. The acceptance a is the probability that a draft after a right text
is right. There are three ways to draft:

- *in turn*: K drafts, then their verification. During it the drafter reads its last draft, for the bonus token.
- *overlapped*: while block n is verified, the drafter continues from its own last draft. It drafts the bonus token,
  then block n + 1. Block n + 1 stands only if all K drafts and the bonus token were right. Otherwise its verification
  settles one token, and the next block stands if the drafter's token at that position was right.
- *overlapped, or anew*: like *overlapped*, but a block that does not stand is drafted again, in turn.

On one GPU both models read their weights from one memory, so drafts during a verification are not free. The step takes
as long as reading the base once and the ARM K + 1 times. Two shares of the read speed are tried: 82 %, which base and
ARM reached on two streams, and 92 %, which the largest product alone reached. The tokens per step are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

# One H100, 8B base and 1B ARM, bfloat16, 2026-11-27 (docs/gpu.md), ms.
BASE = {1: 6.14, 2: 6.18, 4: 6.22, 8: 6.29}  # tokens of a request -> a forward of the base over them
ARM = 1.34  # a forward of the ARM alone
BOTH = 6.84  # a forward of the base over one token and one of the ARM, on two streams
READ_BASE, READ_BOTH = 4.82, 5.6  # reading the weights of the base (W), and of base and ARM, at the measured speed
ON_STREAMS, BEST = READ_BOTH / BOTH, 0.92  # shares of the read speed: on two streams, and for the largest product alone
MOST = 6  # most drafts of a step
ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Plan(NamedTuple):
    """A way to draft: the tokens that a step settles and the milliseconds that it takes, by acceptance and K."""

    tokens: Callable[[float, int], float]
    milliseconds: Callable[[float, int], float]

    def token(self, a: float, k: int) -> float:
        """Return the milliseconds per token."""
        return self.milliseconds(a, k) / self.tokens(a, k)

    def best(self, a: float) -> int:
        """Return the K at which a token takes the least time."""
        return min(range(1, MOST + 1), key=lambda k: self.token(a, k))


def settled(a: float, k: int) -> float:
    """Return the mean tokens of a step whose block stands: the drafts before the first wrong one, and one target."""
    return sum(a**i for i in range(k + 1))


def standing(a: float, k: int) -> float:
    """Return the share of overlapped steps whose block stands.

    A block stands with probability a^(k + 1) after a block that stands, and with probability a after one that does not.
    """
    return a / (a + 1 - a ** (k + 1))


def settled_overlapped(a: float, k: int) -> float:
    return standing(a, k) * settled(a, k) + 1 - standing(a, k)


def verifying(k: int) -> float:
    """Return the ms of the base's forward over K + 1 tokens, interpolated between the measured ones."""
    low, high = max(q for q in BASE if q <= k + 1), min(q for q in BASE if q >= k + 1)
    return BASE[low] + (BASE[high] - BASE[low]) * (k + 1 - low) / max(high - low, 1)


def in_turn(a: float, k: int, beside: float) -> float:
    """Return the ms of a step in turn. beside: the ms by which the drafter's last forward prolongs the verification."""
    return k * ARM + verifying(k) + beside


def overlapped(a: float, k: int, share: float) -> float:
    """Return the ms of an overlapped step on one GPU, at this share of the read speed."""
    return max(verifying(k), (READ_BASE + (k + 1) * (READ_BOTH - READ_BASE)) / share)


def overlapped_on_two(a: float, k: int) -> float:
    """Return the ms of an overlapped step if the ARM has a GPU of its own, without the transfers between the GPUs."""
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
    """Yield the lines of a Markdown table with each plan's cost per token, in W, at its best K."""
    yield "| " + " | ".join(["acceptance", *PLANS]) + " |"
    yield "|---" * (1 + len(PLANS)) + "|"
    for a in ACCEPTANCES:
        best = ((plan.token(a, plan.best(a)) / READ_BASE, plan.best(a)) for plan in PLANS.values())
        yield f"| {a} | " + " | ".join(f"{w:.2f}, K = {k}" for w, k in best) + " |"


if __name__ == "__main__":
    print("W a token, and the K from 1 to 6 at which it is least\n")
    print(*table(), sep="\n")
