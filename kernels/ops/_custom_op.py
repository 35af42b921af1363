"""The library `genarm_fast` of torch custom ops: torch.compile and torch.export see one node for each call.

Only code that is being compiled goes through these ops. A call of guided_sample takes 4 µs directly and 14 µs through
its op. An op made by `torch.library.custom_op` would take another 15 µs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("genarm_fast", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Declare an op and return its overload.

    schema: the op's name, arguments and results in torch's schema language.
    fake: takes the op's arguments and returns empty outputs of the right shapes and dtypes, for tracing.

    `implement` sets the function that the op runs.
    """
    name = schema.split("(", maxsplit=1)[0]
    library.define(schema)
    torch.library.register_fake(f"genarm_fast::{name}", fake, lib=library)
    return getattr(torch.ops.genarm_fast, name).default


def implement(op: Any, run: Callable[..., Any]) -> None:
    """Set the function that an op of `define` runs, on every device."""
    library.impl(op, run, "CompositeExplicitAutograd")
