"""The C++ core for the CPU, built from kernels/csrc where there is a compiler.

GENARM_FAST_ISA = avx512bf16 | avx512vnni | avx512 | avx2 | baseline forces one of the instruction sets that this CPU
has. GENARM_FAST_ISA = none turns the core off.

The core's functions take every argument by position and check all of them. They return None if an argument has to be
converted or refused.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._tensors import dense


def load_core() -> Any:
    """Return the core. None if it was installed without a compiler, or if torch has no DLPack exchange table."""
    with suppress(ImportError):
        found = import_module("._C", __package__)
        found.use_tensors(Tensor)
        found.use_threads(torch.get_num_threads)
        warn_if_older(Path(str(found.__file__)), Path(__file__).parents[1] / "csrc")
        return found
    return None


def warn_if_older(core: Path, sources: Path) -> None:
    """Warn if a C++ source is newer than the core.

    This happens in an editable install, which does not build the C++ again. A wheel has no sources beside it.
    """
    files = (path for path in sources.rglob("*") if path.suffix in (".cpp", ".h"))
    changed = [str(path.relative_to(sources)) for path in files if path.stat().st_mtime > core.stat().st_mtime]
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


def instruction_set() -> str:
    """Return the instruction set in use: the forced one, else the fastest that this CPU has; "none" without a core."""
    return "none" if core is None else forced or core.instruction_sets()[0]


def plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor in the form that the core takes: on the CPU, not a subclass, contiguous in its last dimension.

    dtype: the dtype to convert to; None keeps the tensor's own.
    """
    return dense(tensor.detach().to("cpu", dtype))
