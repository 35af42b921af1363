"""Batch jobs: requests in a JSON-lines file, answers in another, in the same order; killed jobs resume.

The same input, setup and batch size give the same bytes. A request without a seed takes one from the job's seed and its
line number (see `inputs`). Requests are decoded in the same groups whether or not a kill came between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from genarm_fast.errors import GenerationError
from genarm_fast.jobs import openai
from genarm_fast.jobs.inputs import JobRequest, read_requests
from genarm_fast.jobs.results import ResultsFile
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import SamplingParams
from genarm_fast.text.detokenize import token_text

__all__ = ["JobRequest", "ResultsFile", "Summary", "read_requests", "run"]


class Model(Protocol):
    """What a job needs of a GenARM."""

    max_batch_size: int
    tokenizer: Any

    def generate(self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams]) -> list[GenerationOutput]: ...


@dataclass
class Summary:
    """How a run went. requests: all of the job's. kept: answered by earlier runs. errors: (id, message)."""

    requests: int
    kept: int
    answered: int = 0
    completion_tokens: int = 0
    errors: list[tuple[Any, str]] = field(default_factory=list)


def run(
    model: Model,
    requests: Sequence[JobRequest],
    results: ResultsFile,
    progress: Callable[[int, int], None] = lambda lines, tokens: None,
) -> Summary:
    """Answers the requests that `results` does not answer yet, `model.max_batch_size` at a time.

    A request that fails alone gets a line with `error`, and the next run tries it again. `progress` is told of lines
    settled and tokens generated.
    """
    summary = Summary(len(requests), kept=sum(results.answered))

    def answer(indices: Sequence[int], skip: int = 0) -> list[dict[str, Any]]:
        answers = _generate(model, [requests[index] for index in indices])[skip:]
        for index, result in zip(indices[skip:], answers):
            if isinstance(result, str):
                summary.errors.append((requests[index].id, result))
        right = [result for result in answers if not isinstance(result, str)]
        tokens = sum(result.usage.completion_tokens for result in right)
        summary.answered += len(right)
        summary.completion_tokens += tokens
        progress(len(answers), tokens)
        heads = results.heads
        return [
            _line(requests[index], heads[index], result, model.tokenizer)
            for index, result in zip(indices[skip:], answers)
        ]

    size = model.max_batch_size
    failed = [index for index, answered in enumerate(results.answered) if not answered]
    if failed:
        again = [result for at in range(0, len(failed), size) for result in answer(failed[at : at + size])]
        results.replace(dict(zip(failed, again)))
    # Groups count from the job's first line: a resumed job repeats a group that was cut, for the same rounding.
    for at in range(0, len(requests), size):
        group = range(at, min(at + size, len(requests)))
        if group.stop > len(results.answered):
            results.append(answer(group, skip=max(0, len(results.answered) - at)))
    return summary


def _generate(model: Model, requests: Sequence[JobRequest]) -> list[GenerationOutput | str]:
    """Answers, or messages. Those that fail in a group are tried alone, so that an error is the request's own."""
    outputs: Sequence[GenerationOutput | None]
    try:
        outputs = model.generate([request.prompt for request in requests], [request.params for request in requests])
    except Exception as error:
        if len(requests) == 1:
            return [f"{type(error).__name__}: {error}"]
        outputs = error.outputs if isinstance(error, GenerationError) else [None] * len(requests)
    return [
        output if output is not None else _generate(model, [request])[0] for output, request in zip(outputs, requests)
    ]


def _line(request: JobRequest, head: Any, result: GenerationOutput | str, tokenizer: Any) -> dict[str, Any]:
    """What follows a head."""
    if request.openai is not None:
        if isinstance(result, str):
            return openai.failure_of(result)
        return dict(openai.response_of(request.openai, head, result, tokenizer))
    if isinstance(result, str):
        return {"error": result}
    data = result.to_dict(partial(token_text, tokenizer))
    return {name: value for name, value in data.items() if name not in ("timing", "rounds")}
