"""The input file of a batch job.

Each line is an object with `prompt` (text, chat messages or token ids), optionally `id` (any JSON value, by default the
line number) and any field of SamplingParams but `max_time` and `priority`, by which bytes would depend on the machine.
`tools` and `chat_template_kwargs` go to the chat templates, `metadata` (any JSON value) to the output. Lines of
OpenAI's batch files are taken too: see `openai`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from genarm_fast.jobs import openai
from genarm_fast.jobs.identity import digest
from genarm_fast.params import SamplingParams, check_weights
from genarm_fast.text.chats import arguments_of
from genarm_fast.text.prompts import Prompt, as_prompts
from genarm_fast.utils.jsonlines import dumps, located, read_objects

# What JSON can express, and what does not make an answer depend on the time of day.
DEFAULTS = {
    field.name: field.default
    for field in fields(SamplingParams)
    if field.name not in ("logits_processors", "max_time", "priority")
}
FIELDS = tuple(DEFAULTS)
TEMPLATE = ("tools", "chat_template_kwargs")
OUTPUT = ("id", "setup", "request", "error", "prompt", "prompt_token_ids", "completions", "usage")


@dataclass(frozen=True)
class JobRequest:
    """One input line. `params` has a seed. kept: fields that its output line has too. openai: the line, if it is one of
    OpenAI's batch files."""

    line: int
    id: Any
    prompt: Prompt
    params: SamplingParams
    kept: Mapping[str, Any] = field(default_factory=dict)
    openai: Mapping[str, Any] | None = None

    def head(self, setup: str) -> dict[str, Any]:
        """What its output line begins with: `setup` stands for the models, `request` for prompt and parameters."""
        # Fields at their default do not count, so that a job outlives a version with more fields.
        values = {name: getattr(self.params, name) for name in FIELDS}
        parameters = {name: value for name, value in values.items() if value != DEFAULTS[name]}
        template = [arguments] if (arguments := arguments_of(self.prompt)) else []
        head = {"id": self.id, "setup": setup, "request": digest([self.prompt, parameters, *template]), **self.kept}
        return head if self.openai is None else openai.head_of(self.openai, head)


def read_requests(
    path: str | Path, defaults: SamplingParams, *, arms: int, keep: Sequence[str] = ()
) -> list[JobRequest]:
    """Reads and checks all lines. `defaults` are the parameters that a line leaves out; its seed is the job's seed
    (None: 0), from which each line without a seed derives its own. `arms`: how many weights a list must have. `keep`:
    names of fields that go to the output as they are, besides `metadata`.

    Raises ValueError naming file, line, field, value and expectation.
    """
    if taken := [name for name in keep if name in (*OUTPUT, *FIELDS, *TEMPLATE)]:
        raise ValueError(f"keep={taken[0]!r}: expected a name that means nothing in input and output lines")
    requests: list[JobRequest] = []
    lines: dict[str, int] = {}
    for number, row in read_objects(path):
        with located(path, number):
            request = _request(row, number, defaults, arms, ("metadata", *keep))
            other = lines.setdefault(dumps(request.id), number)
            if other != number:
                raise ValueError(f"id={request.id!r}: expected each id once, line {other} has it too")
        requests.append(request)
    return requests


def line_seed(job_seed: int, line: int) -> int:
    """The seed of an input line, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{line}".encode()).digest()[:8], "little")


def _request(row: Mapping[str, Any], line: int, defaults: SamplingParams, arms: int, keep: Sequence[str]) -> JobRequest:
    source = row if openai.is_openai(row) else None
    row = row if source is None else openai.request_of(row)
    unknown = sorted(set(row) - {"id", "prompt", *TEMPLATE, *keep, *FIELDS})
    if unknown:
        raise ValueError(
            f"{unknown[0]}={row[unknown[0]]!r:.60}: expected one of id, prompt, "
            f"{', '.join((*TEMPLATE, *keep, *FIELDS))}; other fields go to the output if they are named by --keep"
        )
    try:
        json.dumps(row.get("id"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # NaN, infinity or half a surrogate pair
        raise ValueError(f"id={row['id']!r}: expected what an output line can hold and a resumed job find") from None
    if not isinstance(row.get("prompt"), (str, list)):
        raise ValueError(f"prompt={row.get('prompt')!r:.60}: expected text, chat messages or token ids")
    (prompt,) = as_prompts([row["prompt"]], **{name: row.get(name) for name in TEMPLATE})
    given = {name: row[name] for name in FIELDS if name in row}
    if given.get("seed") is None:
        given["seed"] = line_seed(defaults.seed or 0, line)
    if given.get("logit_bias") is not None:
        given["logit_bias"] = _biases(given["logit_bias"])
    params = defaults.override(**given)
    if params.weights is not None:
        check_weights(params.weights, arms)
    kept = {name: row[name] for name in keep if name in row}
    return JobRequest(line, row.get("id", line), prompt, params, kept, source)


def _biases(value: Any) -> dict[int, Any]:
    """JSON has only text as keys."""
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise ValueError(f"logit_bias={value!r}: expected an object from token ids to numbers")
    return {int(key): bias for key, bias in value.items()}
