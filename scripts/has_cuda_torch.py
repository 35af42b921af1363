"""Exit with 0 if this Python can run the GPU benchmark: torch is built for CUDA, and all other packages are installed.

`make bench-gpu` runs this script, since a machine with a GPU may have no network to build an environment with. The
script imports nothing large: torch alone would take seconds.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("triton", "transformers", "peft", "pytest")


def built_for_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.exists() and re.search(r"^cuda\b.*= *['\"]", version.read_text(), re.MULTILINE) is not None


if __name__ == "__main__":
    sys.exit(not (built_for_cuda() and all(map(find_spec, NEEDED))))
