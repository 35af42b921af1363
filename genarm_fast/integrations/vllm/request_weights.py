"""Read the weights that a request asks for, from vLLM's `extra_args` (Python) or `vllm_xargs` (HTTP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genarm_fast.integrations.vllm.served import Served
from genarm_fast.params import weights_per_arm

# The value is the name of an ARM, whose own log-probabilities replace the guided ones.
REWARD_KEY = "arm_reward"
# Weights of all ARMs, or by position. The key arm_weights.NAME is for one ARM, since HTTP takes no nested object.
WEIGHTS_KEY = "arm_weights"


def rewarding(extra_args: Mapping[str, Any] | None, served: Served) -> str | None:
    """Return the ARM whose rewards a request asks for instead of the guided distribution, or None.

    Raises:
        ValueError: a value that names no ARM, or weights in the same request.
    """
    for key in extra_args or {}:
        if key.startswith(REWARD_KEY) and key != REWARD_KEY:
            raise ValueError(f"{key}: expected {REWARD_KEY}, with the name of an ARM: {', '.join(served.names)}")
    name = (extra_args or {}).get(REWARD_KEY)
    if name is None:
        return None
    if name not in served.names:
        raise ValueError(f"{REWARD_KEY}={name!r}: expected the name of an ARM, one of {', '.join(served.names)}")
    if any(key.startswith(WEIGHTS_KEY) for key in extra_args or {}):
        raise ValueError(
            f"{REWARD_KEY}, {WEIGHTS_KEY}: expected one of them; rewards are an ARM's own, whatever its weight"
        )
    return str(name)


def requested_weights(extra_args: Mapping[str, Any] | None, served: Served) -> tuple[float, ...]:
    """Return one weight for each ARM: the request's, else the ARM's default.

    Raises:
        ValueError: naming the key, its value and what was expected.
    """
    name = rewarding(extra_args, served)
    if name is not None:
        return tuple(float(each == name) for each in served.names)
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith(WEIGHTS_KEY.rstrip("s"))}
    named = {
        key.removeprefix(f"{WEIGHTS_KEY}."): value for key, value in given.items() if key.startswith(f"{WEIGHTS_KEY}.")
    }
    names = ", ".join(served.names)
    for key in given:
        if key != WEIGHTS_KEY and not key.startswith(f"{WEIGHTS_KEY}."):
            raise ValueError(f"{key}: expected {WEIGHTS_KEY}, or {WEIGHTS_KEY}.NAME with one of {names}")
    if WEIGHTS_KEY in given and named:
        raise ValueError(
            f"{WEIGHTS_KEY}, {WEIGHTS_KEY}.{min(named)}: expected weights by position or by name, not both"
        )
    if not given:
        return tuple(served.defaults)
    asked = named or given[WEIGHTS_KEY]
    if asked is None:
        return tuple(served.defaults)
    try:
        found = weights_per_arm(asked, served.names, served.defaults)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{WEIGHTS_KEY}: {error} ({len(served.names)} ARMs: {names})") from None
    weights = tuple(weight for weight in found if not isinstance(weight, tuple))
    if len(weights) < len(found):
        raise ValueError(f"{WEIGHTS_KEY}: expected a number for each ARM ({names}), not one for each token")
    if served.weight_range is not None:
        low, high = served.weight_range
        for name, weight in zip(served.names, weights):
            if not low <= weight <= high:
                raise ValueError(
                    f"{WEIGHTS_KEY}: {name}={weight:g}: expected {low:g}..{high:g}, the range of this server"
                )
    return weights
