"""Errors of a full disk, with the name of the file that was being written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Texts of errors that have no errno.
DISK_FULL_TEXTS = ("No space left", "os error 28", "os error 27", "File too large", "quota exceeded")
# Texts of torch.save, which drops the cause.
TORCH_WRITE_TEXTS = ("PytorchStreamWriter failed writing", "inline_container.cc", "iostream error")
RESUME_HINT = "; the same command resumes"


@contextmanager
def resumable(path: str | Path) -> Iterator[None]:
    """Turn an error of a full disk in the block into an OSError that names the file and says how to resume."""
    try:
        yield
    except Exception as error:
        text, number = str(error), getattr(error, "errno", None)
        by_torch = any(each in text for each in TORCH_WRITE_TEXTS)
        disk_full = number in DISK_FULL_ERRNOS or by_torch or any(each in text for each in DISK_FULL_TEXTS)
        if RESUME_HINT in text or not disk_full:
            raise
        unknown = "can't be written whole" if by_torch else "No space left on device"
        message = f"{getattr(error, 'strerror', None) or unknown}{RESUME_HINT}"
        raise OSError(number or errno.ENOSPC, message, str(path)) from error
