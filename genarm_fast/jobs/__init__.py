"""Batch jobs: requests in a JSON-lines file, answers in another, in the same order. Killed jobs resume.

The same input, setup and batch size give the same bytes. A request without a seed gets one from the job's seed and its
line number (see `inputs`). Requests are decoded in the same groups whether or not the job was killed in between
(`run`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

from genarm_fast.jobs import openai
from genarm_fast.jobs.checks import Checks
from genarm_fast.jobs.inputs import JobRequest
from genarm_fast.jobs.requests import Requests, read_requests
from genarm_fast.jobs.results import ResultsFile
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import SamplingParams
from genarm_fast.text.detokenize import token_text
from genarm_fast.text.given import Prompt

__all__ = ["JobRequest", "Requests", "ResultsFile", "Summary", "read_requests", "run"]

# Batches of lines in a group. Slots are empty at the end of a group, so few groups waste less.
GROUP_BATCHES = 8
# Seconds for prompts to be tokenised before the first answer, enough for 50,000 short ones.
FIRST_CHECK_SECONDS = 5.0
# Share of the answers' time that is spent on tokenising further prompts.
CHECK_TIME_SHARE = 0.1
WRITE_DELAY_SECONDS = 1.0  # seconds that an answer waits, so that one sync to disk covers several
LINES_PER_REWRITE = 4096  # lines that are held before the file is rewritten
KEPT_ERRORS = 1000


class Model(Protocol):
    """The methods and attributes of a GenARM that a job needs."""

    max_batch_size: int
    tokenizer: Any

    def prepare(self, prompts: Sequence[Prompt], sampling_params: SamplingParams) -> Any: ...

    def as_completed(
        self, prompts: Sequence[Prompt], sampling_params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, GenerationOutput | Exception]]: ...


@dataclass
class Summary:
    """The result of a run.

    requests: number of requests of the whole job. kept: number of requests that earlier runs answered. errors: (id,
    message) of the first thousand failed requests.
    """

    requests: int
    kept: int
    answered: int = 0
    failed: int = 0
    completion_tokens: int = 0
    errors: list[tuple[Any, str]] = field(default_factory=list)


def run(
    model: Model,
    requests: Sequence[JobRequest],
    results: ResultsFile,
    progress: Callable[[int, int], None] = lambda lines, tokens: None,
    *,
    as_prompt: Callable[[Prompt], Prompt] = lambda prompt: prompt,
) -> Summary:
    """Answer the requests that `results` does not answer yet. Each answer is written after the answers before it.

    Groups of `GROUP_BATCHES * model.max_batch_size` lines are decoded together, fewer if lines ask for several
    completions. Groups are counted from the first line of the job. A resumed job therefore decodes the interrupted
    group again, so that its numbers are rounded alike. Prompts are tokenised ahead, some before the first answer,
    others between groups.

    A request that fails by itself gets a line with `error`, and the next run tries it again. progress: called with
    numbers of lines answered and tokens generated. as_prompt: returns the prompt that the model gets for a line's
    prompt.

    Raises:
        ValueError: naming file and line of a prompt that the model cannot take. The lines written before stay.
        OSError: the output's disk is full.
    """
    return _Job(model, requests, results, progress, as_prompt).run()


class _Job:
    """One run. The arguments are those of `run`."""

    def __init__(
        self,
        model: Model,
        requests: Sequence[JobRequest],
        results: ResultsFile,
        progress: Callable[[int, int], None],
        as_prompt: Callable[[Prompt], Prompt],
    ) -> None:
        self.model, self.requests, self.results = model, requests, results
        self.progress, self.as_prompt = progress, as_prompt
        self.group_size = GROUP_BATCHES * model.max_batch_size
        self.summary = Summary(len(requests), kept=sum(results.answered))

    def run(self) -> Summary:
        done = len(self.results.answered)
        if self.results.last is not None and sum(self.results.answered) < len(self.requests):
            self._check_prompt(*self.results.last)
        checks = Checks(self.model.prepare, self.requests[done:], self.as_prompt)
        if done < len(self.requests):
            if isinstance(self.requests, Requests):
                checks.one(self.requests.longest)
                if self.requests.widest is not None:
                    checks.one(self.requests.widest)
            checks.check_for(FIRST_CHECK_SECONDS)
        if not all(self.results.answered):
            self._retry_failed()
        first = done - done % self.group_size
        rest = iter(self.requests[first:])
        # A group never crosses a multiple of `group_size`, so a resumed job finds its beginning without decoding
        # earlier groups.
        while block := list(islice(rest, self.group_size)):
            for group in self._groups(block):
                stop = first + len(group)
                if stop > done:
                    checks.check_until(stop - done)
                    start = time.monotonic()
                    self._append(first, group)
                    checks.check_for(CHECK_TIME_SHARE * (time.monotonic() - start))
                first = stop
        return self.summary

    def _check_prompt(self, index: int, line: bytes) -> None:
        """Raises ValueError if the base reads a prompt differently from when it was answered.

        This detects, for example, a template that renders the date. The job's digests do not show such a change.
        """
        request, row = self.requests[index], json.loads(line)
        (prepared,) = self.model.prepare([self.as_prompt(request.prompt)], request.params)
        now = prepared.token_ids[0]
        if request.openai is None:
            same = row["prompt_token_ids"] == now
        else:
            same = row["response"]["body"]["usage"]["prompt_tokens"] == len(now)
        if not same:
            raise ValueError(
                f"{self.results.path} line {index + 1}: its prompt had other tokens than it has now, as where a chat"
                " template renders the date: expected the same; choose another output file, or overwrite"
            )

    def _groups(self, requests: Sequence[JobRequest]) -> Iterator[Sequence[JobRequest]]:
        """Split requests into groups of at most `group_size` completions. A request for more is a group by itself."""
        group: list[JobRequest] = []
        completions = 0
        for request in requests:
            if group and completions + request.params.n > self.group_size:
                yield group
                group, completions = [], 0
            group.append(request)
            completions += request.params.n
        yield group

    def _append(self, first: int, group: Sequence[JobRequest]) -> None:
        """Answer a group and write its new lines. first: the index of the group's first request."""
        waiting: dict[int, dict[str, Any]] = {}
        rows: list[dict[str, Any]] = []  # rows to write next, in order, from index `begin` of the group
        begin, written = len(self.results.answered) - first, time.monotonic()
        for index, result in _answers(self.model, [self._asked(request) for request in group]):
            if index < begin:
                continue  # written before the job was killed
            waiting[index] = self._row(group[index], result)
            while (row := waiting.pop(begin + len(rows), None)) is not None:
                rows.append(row)
            if rows and (len(rows) >= self.model.max_batch_size or time.monotonic() - written > WRITE_DELAY_SECONDS):
                self.results.append(rows)
                begin, rows, written = begin + len(rows), [], time.monotonic()
        if rows:
            self.results.append(rows)

    def _retry_failed(self) -> None:
        """Try the requests again that failed in an earlier run."""
        lines = zip(self.requests, self.results.answered)
        failed = ((index, request) for index, (request, answered) in enumerate(lines) if not answered)
        while part := list(islice(failed, LINES_PER_REWRITE)):
            rows: dict[int, dict[str, Any]] = {}
            at = iter(part)
            for group in self._groups([request for _, request in part]):
                indices = [index for index, _ in islice(at, len(group))]
                for i, result in _answers(self.model, [self._asked(request) for request in group]):
                    rows[indices[i]] = self._row(group[i], result)
            self.results.replace(rows)

    def _asked(self, request: JobRequest) -> tuple[Prompt, SamplingParams]:
        return self.as_prompt(request.prompt), request.params

    def _row(self, request: JobRequest, result: GenerationOutput | str) -> dict[str, Any]:
        """Return a request's output line, and count the request."""
        summary, tokens = self.summary, 0
        if isinstance(result, str):
            summary.failed += 1
            if len(summary.errors) < KEPT_ERRORS:
                summary.errors.append((request.id, result))
        else:
            tokens = result.usage.completion_tokens
            summary.answered += 1
            summary.completion_tokens += tokens
        self.progress(1, tokens)
        head = request.head(self.results.setup)
        return {**head, **_line(request, head, result, self.model.tokenizer)}


def _answers(
    model: Model, asked: Sequence[tuple[Prompt, SamplingParams]]
) -> Iterator[tuple[int, GenerationOutput | str]]:
    """Yield (index, answer or error message) in the order in which they finish.

    Requests that fail in a group are tried alone, so that an error is the request's own. If the group fails as a whole,
    its halves are tried: one bad request in a hundred costs about as much as another group.
    """
    left = dict.fromkeys(range(len(asked)), "")
    whole = True
    try:
        for index, result in model.as_completed([prompt for prompt, _ in asked], [params for _, params in asked]):
            if isinstance(result, Exception):
                left[index] = _message(result)
            else:
                del left[index]
                yield index, result
    except Exception as error:
        whole = False
        left = dict.fromkeys(left, _message(error))
    if len(asked) == 1:
        yield from left.items()
        return
    rest = list(left)
    size = 1 if whole else (len(rest) + 1) // 2
    for at in range(0, len(rest), size):
        part = rest[at : at + size]
        for index, answer in _answers(model, [asked[i] for i in part]):
            yield part[index], answer


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _line(request: JobRequest, head: Any, result: GenerationOutput | str, tokenizer: Any) -> dict[str, Any]:
    """Return the fields of an output line after its head."""
    if request.openai is not None:
        if isinstance(result, str):
            return openai.failure_of(result)
        return dict(openai.response_of(request.openai, head, result, tokenizer))
    if isinstance(result, str):
        return {"error": result}
    data = result.to_dict(partial(token_text, tokenizer))
    return {name: value for name, value in data.items() if name not in ("timing", "rounds")}
