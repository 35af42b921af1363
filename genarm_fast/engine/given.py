"""Checks of what callers pass to an engine.

They run in the caller's thread, since another thread's step may carry out what the caller asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

from genarm_fast.engine.sequence import Request, Sequence
from genarm_fast.speculation.config import Speculation, as_speculation
from genarm_fast.utils.checks import shown


def check_request(request: object, members: int, arms: int) -> Request:
    """Return the request. Raises TypeError, ValueError unless it was made for these numbers of members and ARMs.

    members: the number of members, a draft model included.
    """
    if not isinstance(request, Request):
        raise TypeError(f"request={shown(request)}: expected one that `prepare` made")
    if (len(request.token_ids), len(request.weights)) != (members, arms):
        raise ValueError(f"request: expected one for {arms} ARMs, as `prepare` of this model makes")
    return request


def check_speculation(speculation: object, drafters: Iterable[str]) -> Speculation:
    """Return the speculation setting. Raises ValueError for other values, and for a drafter that is not in the list."""
    plan, known = as_speculation(speculation), list(drafters)
    if plan.drafter is not None and plan.drafter not in known:
        raise ValueError(f"speculation: drafter={plan.drafter!r}: expected one of {', '.join(map(repr, known))}")
    return plan


def given_sequences(sequences: object, owner: object) -> list[Sequence]:
    """Return the sequences as a list. Raises TypeError for other objects, ValueError for sequences of another owner."""
    if isinstance(sequences, Sequence) or not isinstance(sequences, Iterable):
        raise TypeError(f"sequences={shown(sequences)}: expected a list of sequences")
    given = list(sequences)
    for sequence in given:
        if not isinstance(sequence, Sequence):
            raise TypeError(f"sequences: expected a list of sequences, got {shown(sequence)} in it")
        if sequence.owner not in (None, owner):
            raise ValueError("sequences: expected those of this engine, got one of another engine")
    return given


def new_sequences(sequences: object, owner: object) -> list[Sequence]:
    """Return the sequences as `given_sequences` does. Raises ValueError also for those that an engine has or had."""
    given = given_sequences(sequences, owner)
    if any(sequence.owner is not None or sequence.ended for sequence in given) or len(set(given)) < len(given):
        raise ValueError("sequences: expected new ones, got one that an engine has or had already")
    return given
