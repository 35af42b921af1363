"""Errors of a full disk, with the name of the file that was being written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID = ("No space left", "os error 28", "os error 27", "File too large", "quota exceeded")  # texts without an errno
TORCH = ("PytorchStreamWriter failed writing", "inline_container.cc", "iostream error")  # torch.save drops the cause
RESUMES = "; the same command resumes"


@contextmanager
def resumable(path: str | Path) -> Iterator[None]:
    """Turn an error of a full disk in the block into an OSError that names the file and says how to resume."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if RESUMES in str(error) or (number not in FULL and not any(said in str(error) for said in (*SAID, *TORCH))):
            raise
        unknown = "can't be written whole" if any(said in str(error) for said in TORCH) else "No space left on device"
        said = f"{getattr(error, 'strerror', None) or unknown}{RESUMES}"
        raise OSError(number or errno.ENOSPC, said, str(path)) from error
