"""The requests of an input file, which is read anew each time: a million lines take little memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy

from genarm_fast.jobs.inputs import Form, JobRequest
from genarm_fast.params import SamplingParams
from genarm_fast.text.given import Prompt
from genarm_fast.utils.jsonlines import dumps, located, parsed, read_lines
from genarm_fast.utils.pipes import copied, is_pipe

TOKEN_CHARACTERS = 4  # of a usual text


@dataclass(frozen=True)
class Requests(Sequence[JobRequest]):
    """Iterating reads the lines again; slices are views of the file as well. 8 bytes a line are kept.

    longest: the request whose prompt is longest. widest: the one whose parameters name the highest token id, None
    where none names any. Iterating raises ValueError for a line that is another one by now.
    """

    form: Form
    longest: JobRequest
    widest: JobRequest | None
    _path: Path
    _hashes: array[int]
    _range: range
    _copy: Any = field(default=None, repr=False)  # of an input that can be read but once: it lives as long as this

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[JobRequest]:
        lines, stop = read_lines(self._path, self.form.file), self._range.stop
        for index in range(stop):
            number, line = next(lines, (0, b""))
            if hash(line) != self._hashes[index]:
                where = f"{self.form.file} line {number}" if number else self.form.file
                raise ValueError(f"{where}: expected the line that was there when the job began")
            if index >= self._range.start:
                yield self.form.request(parsed(self.form.file, number, line), number)

    @overload
    def __getitem__(self, key: int) -> JobRequest: ...
    @overload
    def __getitem__(self, key: slice) -> Requests: ...
    def __getitem__(self, key: int | slice) -> JobRequest | Requests:
        """An index reads the file up to there. Raises ValueError for a slice that leaves out lines inside it."""
        if isinstance(key, slice):
            if key.step not in (None, 1):
                raise ValueError(f"step={key.step}: expected 1")
            return replace(self, _range=self._range[key])
        start = self._range[key]
        return next(iter(replace(self, _range=range(start, start + 1))))


def read_requests(
    path: str | Path,
    defaults: SamplingParams,
    *,
    arms: int | Sequence[str],
    keep: Sequence[str] = (),
    progress: Callable[[int], None] = lambda lines: None,
) -> Requests:
    """Checks all lines but for what the members decide: lengths of prompts in tokens, and the size of the vocabulary.

    Args:
        path: JSON lines, plain or `.gz`. A pipe is copied to a temporary file.
        defaults: the parameters that a line leaves out, `max_time` and `priority` not among them; its seed is the job's
            seed (None: 0), from which each line without a seed derives its own.
        arms: names of the ARMs. Their number alone leaves names of weights unchecked here.
        keep: names of fields that go to the output as they are, besides `metadata`.
        progress: told how many lines were checked, every thousand of them.

    Raises:
        ValueError: naming file, line, field, value and expectation.
    """
    path, name = Path(path), str(path)
    form, copy = Form(name, defaults, arms, keep), copied(path) if is_pipe(path) else None
    if copy is not None:
        path = Path(copy.name)
    hashes, ids, longest, widest, size, highest, count = array("q"), array("q"), None, None, -1, -1, 0
    for number, line in read_lines(path, name):
        row = parsed(name, number, line)
        try:
            id, prompt = form.check(row)
            if (own := _size(prompt)) > size:
                longest, size = form.request(row, number), own
            if form.highest > highest:
                widest, highest = form.request(row, number), form.highest
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} line {number}: {error}") from error
        hashes.append(hash(line))
        ids.append(_id_hash(number if "id" not in row and id is None else id))
        count += 1
        if count % 1000 == 0:
            progress(count)
    if longest is None:
        raise ValueError(f"{name}: expected one JSON object a line, found none")
    requests = Requests(form, longest, widest, path, hashes, range(count), copy)
    _check_unique(requests, ids)
    progress(count)
    return requests


def _size(prompt: Prompt) -> int:
    """About as many characters as it has."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(TOKEN_CHARACTERS if isinstance(item, int) else len(item.get("content") or "") for item in prompt)


def _id_hash(id: Any) -> int:
    return hash(id if isinstance(id, str) else dumps(id))


def _check_unique(requests: Requests, ids: array[int]) -> None:
    """Raises ValueError for an id that two lines have. ids: hashes, which get sorted; few are equal by chance."""
    values = numpy.frombuffer(ids, numpy.int64)  # shares their memory
    values.sort()
    suspected = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspected:
        return
    lines: dict[str, int] = {}
    for request in requests:
        text = dumps(request.id)
        if _id_hash(request.id) in suspected and lines.setdefault(text, request.line) != request.line:
            with located(requests.form.file, request.line):
                raise ValueError(f"id={request.id!r}: expected each id once, line {lines[text]} has it too")
