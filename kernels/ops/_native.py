"""The C++ core (kernels/csrc) on the CPU, where it was built.

GENARM_FAST_ISA = avx512 | avx2 | baseline forces an instruction set; `none` turns the core off.

Its functions take every argument by position, check all of them, and return None for a call that they do not take as it
stands: arguments to refuse, or to convert first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_core() -> Any:
    """The core, or None: installed without a compiler, or a torch that has no DLPack exchange table."""
    with suppress(ImportError):
        found = import_module("._C", __package__)
        found.use_tensors(Tensor)
        warn_if_older(Path(str(found.__file__)), Path(__file__).parents[1] / "csrc")
        return found
    return None


def warn_if_older(core: Path, sources: Path) -> None:
    """An editable install runs the Python of now over the C++ of its installation; a wheel has no sources beside it."""
    changed = [path.name for path in sources.glob("*") if path.stat().st_mtime > core.stat().st_mtime]
    if changed:
        warnings.warn(
            f"genarm_fast's C++ core is older than {', '.join(sorted(changed))} in {sources}: install again "
            "(pip install -e ., or make test)",
            RuntimeWarning,
            stacklevel=2,
        )


core: Any = load_core()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

forced = os.environ.get("GENARM_FAST_ISA")
if forced == "none":
    core = None
elif forced and core is not None:
    if forced not in core.instruction_sets():
        raise ValueError(f"GENARM_FAST_ISA={forced}: expected none or one of {', '.join(core.instruction_sets())}")
    core.use(forced)


def plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor as the core takes it: on the CPU, no subclass, contiguous in its last dimension."""
    tensor = tensor.detach().to("cpu", dtype)
    return tensor if not tensor.ndim or tensor.stride(-1) == 1 else tensor.contiguous()


def guided_sample(
    base: Tensor,
    arms: Sequence[Tensor],
    weights: Tensor | Sequence,
    vocab_size: int,
    logit_bias: Tensor | None,
    return_logprobs: bool,
    top_logprobs: int,
    *,
    temperature: Tensor | float,
    top_k: Tensor | int,
    top_p: Tensor | float,
    min_p: Tensor | float,
    seeds: Tensor | int,
    positions: Tensor | int,
) -> tuple[Tensor | None, ...] | None:
    """The fields of GuidedSample of arguments that were checked, converted to what the core takes."""

    def parameter(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
        if isinstance(value, Tensor):
            return plain(value, dtype)
        return float(value) if dtype.is_floating_point else int(value)  # numpy's, bools

    return core.guided_sample(
        plain(base),
        [plain(logits) for logits in arms],
        plain(torch.as_tensor(weights, dtype=torch.float32)),
        int(vocab_size),
        None if logit_bias is None else plain(logit_bias, torch.float32),
        return_logprobs,
        int(top_logprobs),
        torch.get_num_threads(),
        parameter(temperature, torch.float32),
        parameter(top_k, torch.int64),
        parameter(top_p, torch.float32),
        parameter(min_p, torch.float32),
        parameter(seeds, torch.int64),
        parameter(positions, torch.int64),
    )
