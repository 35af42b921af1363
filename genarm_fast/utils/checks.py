"""Numbers of callers, checked: errors name the argument, its value, and what was expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

# Numbers that act on scores. Arithmetic on them is in float32, which ends at 3.4e38: up to here a logit of 1e8 and a
# million tokens of a penalty still fit.
LARGEST = 1e30


def number(value: Any) -> Any:
    """What a tensor or array of no dimension holds; all else as it is."""
    return value.tolist() if getattr(value, "shape", None) == () else value


def check_integer(name: str, value: object, expected: str, low: int, *, high: int | None = None) -> int:
    """As a Python int; numpy's overflow. Raises TypeError, ValueError."""
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
    """As a Python float, of at most `LARGEST` in size. Raises TypeError, ValueError."""
    value = number(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected {expected}")
    if not is_finite(value) or not low <= float(value) <= high or (open_low and float(value) == low):
        raise ValueError(f"{name}={shown(value)}: expected {expected}{too_large(value)}")
    return float(value)


def is_finite(value: Any) -> bool:
    """Whether a number is no NaN, and at most `LARGEST` in size."""
    return bool(abs(value) <= LARGEST)


def too_large(value: Any) -> str:
    """What to add to what is expected where a number is finite, but too large."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return ""
    size: Any = abs(value)
    return f", of at most {LARGEST:.0e} in size" if LARGEST < size < math.inf else ""


def check_flag(name: str, value: object) -> bool:
    """As a Python bool; NumPy's, and a tensor of no dimension, are taken. Raises TypeError."""
    value = number(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected True or False")
    return value


def shown(value: object) -> str:
    """A value in an error, in one line of at most 80 characters: a model's text has a line for each module.

    Some have no text, such as integers of 5000 digits.
    """
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
