"""The C++ core (kernels/csrc) on the CPU, where it was built.

GENARM_FAST_ISA = avx512bf16 | avx512vnni | avx512 | avx2 | baseline forces one of the instruction sets that run here;
`none` turns the core off.

Its functions take every argument by position, check all of them, and return None for a call that they do not take as it
stands: arguments to refuse, or to convert first.
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
    """The core, or None: installed without a compiler, or a torch that has no DLPack exchange table."""
    with suppress(ImportError):
        found = import_module("._C", __package__)
        found.use_tensors(Tensor)
        found.use_threads(torch.get_num_threads)
        warn_if_older(Path(str(found.__file__)), Path(__file__).parents[1] / "csrc")
        return found
    return None


def warn_if_older(core: Path, sources: Path) -> None:
    """An editable install runs the Python of now over the C++ of its installation; a wheel has no sources beside it."""
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
    """The one in use: the forced one, else the fastest that runs here; "none" without a core."""
    return "none" if core is None else forced or core.instruction_sets()[0]


def plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor as the core takes it: on the CPU, no subclass, contiguous in its last dimension."""
    return dense(tensor.detach().to("cpu", dtype))
