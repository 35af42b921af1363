"""The output file of a batch job: whole lines, appended in order, each group synced to disk."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from genarm_fast.jobs.inputs import JobRequest
from genarm_fast.utils.disk import resumable
from genarm_fast.utils.jsonlines import dumps, located

_OTHERWISE = "; choose another output file, or overwrite"


class ResultsFile:
    """The output file. Line i is the answer to request i, or has its `error`.

    Opening locks the file until it is closed, and checks its lines against the first requests. With `overwrite` the
    lines are not checked, and the first write replaces them.

    setup: the digest that stands for the models, see `JobRequest.head`. answered: for each line, True for an answer,
    False for an error. last: index and text of the last answered line that was there.

    Raises:
        ValueError: no regular file, or the lines of another job.
        BlockingIOError: a running job writes the file.
    """

    def __init__(
        self,
        path: str | Path,
        requests: Iterable[JobRequest],
        setup: str,
        *,
        overwrite: bool = False,
        progress: Callable[[int], None] = lambda lines: None,
    ) -> None:
        self.path, self.setup = Path(path), setup
        self.answered: list[bool] = []
        self.last: tuple[int, bytes] | None = None
        self._file = _open_locked(self.path)
        try:
            self._kept_bytes = 0 if overwrite else self._check(requests, progress)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with resumable(self.path):
            try:
                self._file.close()
            except OSError:
                # Otherwise the first error is the one to report.
                if error is None:
                    raise

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the next lines at once, each with its head. They are on disk when this returns."""
        lines = b"".join(map(_line, rows))
        with resumable(self.path):
            self._file.truncate(self._kept_bytes)  # removes half a line that a kill left
            self._file.write(lines)
            _sync(self._file)
        self._kept_bytes = self._file.tell()
        self.answered += [row.get("error") is None for row in rows]

    def replace(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Replace lines by new rows, by index: all of them or, if killed, none."""
        path = self.path.resolve()
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        file = _open_locked(temporary)
        with resumable(temporary), open(path, "rb") as old:
            whole = enumerate(islice(old, len(self.answered)))
            file.writelines(_line(rows[i]) if i in rows else line for i, line in whole)
            _sync(file)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        self._file.close()
        self._file = file
        self._kept_bytes = file.tell()
        for index, row in rows.items():
            self.answered[index] = row.get("error") is None

    def _check(self, requests: Iterable[JobRequest], progress: Callable[[int], None]) -> int:
        """Fill `answered`, and return the number of bytes of the whole lines."""
        size, rest = 0, iter(requests)
        with open(self.path, "rb") as file:
            for index, line in enumerate(file):
                with located(self.path, index + 1):
                    request = next(rest, None)
                    if request is None:
                        raise ValueError(f"expected one line per request, {index} at most{_OTHERWISE}")
                    head = request.head(self.setup)
                    start = dumps(head).encode()[:-1]
                    if not line.endswith(b"\n"):
                        if not (line.startswith(start) or start.startswith(line)):
                            raise ValueError(f"expected a line of this job, found {line[:40]!r}{_OTHERWISE}")
                        break
                    # Most lines begin with the bytes of their head and have no error. Parsing them would take longer.
                    whole = line.startswith(start) and line.endswith(b"}\n") and b'"error"' not in line[len(start) :]
                    self.answered.append(whole or _checked_row(line, head).get("error") is None)
                size += len(line)
                if self.answered[-1]:
                    self.last = index, line
                if index % 1000 == 0:
                    progress(index)
        return size


def _line(row: Mapping[str, Any]) -> bytes:
    return dumps(row).encode() + b"\n"


def _checked_row(line: bytes, head: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
        found = {name: row[name] for name in head}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"expected a line of this job, found {line[:40]!r}{_OTHERWISE}") from None
    if found["setup"] != head["setup"]:
        raise ValueError(f"made with other models, templates or dtype than this job's{_OTHERWISE}")
    if found != head:
        raise ValueError(
            f"id {found['id']!r} was answered for another prompt or other parameters than this job's{_OTHERWISE}"
        )
    return row


def _open_locked(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a regular file, which a job can read again")
    file = open(path, "ab")  # noqa: SIM115 (its owner closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(f"{path}: another running job writes it") from None
    return file


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Wait until a rename is on disk, before anything is appended under the new name."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
