"""Errors of a full disk that name what was being written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID = ("No space left", "os error 28", "File too large", "quota exceeded")  # by libraries that lose the number


@contextmanager
def resumable(path: str | Path) -> Iterator[None]:
    """Raises OSError that names the file, and says that the same command resumes, where the disk is full."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number not in FULL and not any(said in str(error) for said in SAID):
            raise
        said = f"{getattr(error, 'strerror', None) or 'No space left on device'}; the same command resumes"
        raise OSError(number or errno.ENOSPC, said, str(path)) from error
