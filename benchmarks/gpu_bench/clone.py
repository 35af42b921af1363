"""Make a clone of the package importable where it is not installed: a machine without network may not install it."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def importable() -> None:
    """Let this process and its child processes import `genarm_fast`.

    The package's folder `kernels` is kernels/ops in the clone. A temporary folder of links puts it where it belongs.
    """
    if importlib.util.find_spec("genarm_fast") is not None:
        return
    folder = Path(tempfile.mkdtemp(prefix="genarm-fast-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "genarm_fast"
    package.mkdir()
    for path in (ROOT / "genarm_fast").iterdir():
        (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels" / "ops")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
