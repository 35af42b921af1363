"""Exact guided decoding with autoregressive reward models (GenARM, arXiv 2410.08193)."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genarm_fast.api import GenARM
    from genarm_fast.errors import GenerationError
    from genarm_fast.functional import agenerate, astream, generate, release, stream
    from genarm_fast.models.arm import ARM
    from genarm_fast.outputs import GenerationOutput
    from genarm_fast.params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "ARM",
    "GenARM",
    "GenerationError",
    "GenerationOutput",
    "SamplingParams",
    "__version__",
    "agenerate",
    "astream",
    "generate",
    "release",
    "stream",
]

# Modules of the public names. Each is imported on first use, since the import of transformers takes seconds.
_MODULES = {
    "ARM": "models.arm",
    "GenARM": "api",
    "GenerationError": "errors",
    "GenerationOutput": "outputs",
    "SamplingParams": "params",
    "agenerate": "functional",
    "astream": "functional",
    "generate": "functional",
    "release": "functional",
    "stream": "functional",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] in ("api", "functional") and f"{__name__}.api" not in sys.modules:
        from genarm_fast.utils.collector import collector_waits

        with collector_waits():
            # torch scans all loaded modules when the first op is registered. That takes 70 ms before transformers is
            # imported and 350 ms after it, so the kernels come first.
            import_module(".kernels", __name__)
            import_module(".api", __name__)
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
