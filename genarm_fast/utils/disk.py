"""Errors of a full disk that name what was being written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID = ("No space left", "os error 28", "os error 27", "File too large", "quota exceeded")  # where the number is lost
TORCH = ("PytorchStreamWriter failed writing", "inline_container.cc", "iostream error")  # torch.save loses the reason
RESUMES = "; the same command resumes"


@contextmanager
def resumable(path: str | Path) -> Iterator[None]:
    """Raises OSError that names the file, and says that the same command resumes, where the disk is full."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if RESUMES in str(error) or (number not in FULL and not any(said in str(error) for said in (*SAID, *TORCH))):
            raise
        unknown = "can't be written whole" if any(said in str(error) for said in TORCH) else "No space left on device"
        said = f"{getattr(error, 'strerror', None) or unknown}{RESUMES}"
        raise OSError(number or errno.ENOSPC, said, str(path)) from error
