"""The requests of an input file. The file is read again each time, so a million lines take little memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy

from genarm_fast.jobs.inputs import JobRequest, LineParser
from genarm_fast.params import SamplingParams
from genarm_fast.text.given import Prompt
from genarm_fast.utils.jsonlines import dumps, located, parsed, read_lines
from genarm_fast.utils.pipes import copied, is_pipe

TOKEN_CHARACTERS = 4  # characters of a token in usual text


@dataclass(frozen=True)
class Requests(Sequence[JobRequest]):
    """The requests of a file. Iterating reads its lines again; a slice is a view of the file too.

    8 bytes for each line are kept. longest: the request with the longest prompt. widest: the request whose parameters
    name the highest token id; None if no line names one. Iterating raises ValueError for a line that has changed.
    """

    parser: LineParser
    longest: JobRequest
    widest: JobRequest | None
    _path: Path
    _hashes: array[int]
    _range: range
    # Copy of an input that can be read only once; it lives as long as this object.
    _copy: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[JobRequest]:
        lines, stop = read_lines(self._path, self.parser.file), self._range.stop
        for index in range(stop):
            number, line = next(lines, (0, b""))
            if hash(line) != self._hashes[index]:
                where = f"{self.parser.file} line {number}" if number else self.parser.file
                raise ValueError(f"{where}: expected the line that was there when the job began")
            if index >= self._range.start:
                yield self.parser.request(parsed(self.parser.file, number, line), number)

    @overload
    def __getitem__(self, key: int) -> JobRequest: ...
    @overload
    def __getitem__(self, key: slice) -> Requests: ...
    def __getitem__(self, key: int | slice) -> JobRequest | Requests:
        """Return a request, or a slice. An index reads the file up to that line.

        Raises:
            ValueError: a slice with a step other than 1.
        """
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
    """Check all lines, except for what the members decide: lengths of prompts in tokens, and the vocabulary's size.

    Args:
        path: JSON lines, plain or `.gz`. A pipe is copied to a temporary file.
        defaults: the parameters that a line leaves out, except `max_time` and `priority`. Its seed is the job's seed
            (None: 0), from which each line without a seed derives its own.
        arms: names of the ARMs. If only their number is given, names of weights are not checked here.
        keep: names of fields that are copied to the output, besides `metadata`.
        progress: called with the number of lines checked so far, every thousand lines.

    Raises:
        ValueError: naming file, line, field, value and expectation.
    """
    path, name = Path(path), str(path)
    parser, copy = LineParser(name, defaults, arms, keep), copied(path) if is_pipe(path) else None
    if copy is not None:
        path = Path(copy.name)
    hashes, ids, longest, widest, size, highest, count = array("q"), array("q"), None, None, -1, -1, 0
    for number, line in read_lines(path, name):
        row = parsed(name, number, line)
        try:
            id, prompt = parser.check(row)
            if (own := _size(prompt)) > size:
                longest, size = parser.request(row, number), own
            if parser.highest > highest:
                widest, highest = parser.request(row, number), parser.highest
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} line {number}: {error}") from error
        hashes.append(hash(line))
        ids.append(_id_hash(number if "id" not in row and id is None else id))
        count += 1
        if count % 1000 == 0:
            progress(count)
    if longest is None:
        raise ValueError(f"{name}: expected one JSON object a line, found none")
    requests = Requests(parser, longest, widest, path, hashes, range(count), copy)
    _check_unique(requests, ids)
    progress(count)
    return requests


def _size(prompt: Prompt) -> int:
    """Return the prompt's approximate number of characters."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(TOKEN_CHARACTERS if isinstance(item, int) else len(item.get("content") or "") for item in prompt)


def _id_hash(id: Any) -> int:
    return hash(id if isinstance(id, str) else dumps(id))


def _check_unique(requests: Requests, ids: array[int]) -> None:
    """Raises ValueError for an id that two lines have. ids: hashes, sorted in place; few are equal by chance."""
    values = numpy.frombuffer(ids, numpy.int64)  # shares the memory of ids
    values.sort()
    suspected = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspected:
        return
    lines: dict[str, int] = {}
    for request in requests:
        text = dumps(request.id)
        if _id_hash(request.id) in suspected and lines.setdefault(text, request.line) != request.line:
            with located(requests.parser.file, request.line):
                raise ValueError(f"id={request.id!r}: expected each id once, line {lines[text]} has it too")
