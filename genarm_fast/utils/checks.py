"""Checks of numbers that callers pass: errors name the argument, its value, and what was expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

# Largest size of numbers that act on scores. Their arithmetic is in float32, whose largest number is 3.4e38. So a
# weight of this size times a logit of 1e8 still fits, and so does a penalty of this size for a million tokens.
LARGEST = 1e30


def number(value: Any) -> Any:
    """Return the number in a tensor or array without dimensions, and any other value as it is."""
    return value.tolist() if getattr(value, "shape", None) == () else value


def check_integer(name: str, value: object, expected: str, low: int, *, high: int | None = None) -> int:
    """Return an integer in low..high as a Python int, since numpy's integers overflow.

    Raises TypeError, ValueError with `expected` in the message.
    """
    value = number(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected {expected}")
    integer = int(value)
    if integer < low or (high is not None and integer > high):
        raise ValueError(f"{name}={shown(value)}: expected {expected}")
    return integer


def check_real(
    name: str, value: object, expected: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """Return a number in low..high, at most `LARGEST` in size, as a Python float. open_low: `low` itself is refused.

    Raises TypeError, ValueError with `expected` in the message.
    """
    value = number(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected {expected}")
    if not is_finite(value) or not low <= float(value) <= high or (open_low and float(value) == low):
        raise ValueError(f"{name}={shown(value)}: expected {expected}{too_large(value)}")
    return float(value)


def is_finite(value: Any) -> bool:
    """Whether a number is not NaN, and at most `LARGEST` in size."""
    return bool(abs(value) <= LARGEST)


def too_large(value: Any) -> str:
    """Return the words that an error adds to `expected` for a number that is finite but too large; else ""."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return ""
    size: Any = abs(value)
    return f", of at most {LARGEST:.0e} in size" if LARGEST < size < math.inf else ""


def check_flag(name: str, value: object) -> bool:
    """Return a bool as a Python bool. NumPy's bools and tensors without dimensions count. Raises TypeError."""
    value = number(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected True or False")
    return value


def shown(value: object) -> str:
    """Return a value's `repr` for an error, in one line of at most 80 characters, or its type if it has none.

    The `repr` of a model has a line for each module. An integer of 5000 digits, for example, has no `repr`.
    """
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
