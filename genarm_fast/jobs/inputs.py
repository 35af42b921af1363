"""The input file of a batch job.

Each line is an object with `prompt` (text, chat messages or token ids) and optionally `id` (any JSON value, by default
the line number). It may have any field of SamplingParams except `max_time` and `priority`, which would make the output
depend on the machine. `tools` and `chat_template_kwargs` go to the chat templates, `metadata` (any JSON value) to the
output. Lines of OpenAI's batch files are accepted too, see `openai`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from genarm_fast.jobs import openai
from genarm_fast.jobs.identity import digest
from genarm_fast.params import SamplingParams, check_weights, weights_per_arm
from genarm_fast.text.chats import arguments_of
from genarm_fast.text.given import Prompt, as_prompts
from genarm_fast.text.messages import may_be_stored

MACHINE_FIELDS = ("max_time", "priority")  # fields that make an answer depend on the machine
# The fields that JSON can express, except those of the machine.
DEFAULTS = {
    field.name: field.default
    for field in fields(SamplingParams)
    if field.name not in ("logits_processors", *MACHINE_FIELDS)
}
FIELDS = tuple(DEFAULTS)
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
LINE_PARAMETERS = {*FIELDS} - {"seed"}  # lines differ in their seeds
# Most sets of parameters that are remembered, and most characters of one of them.
MOST_SEEN, LONGEST_SEEN = 1024, 1024
OUTPUT_FIELDS = ("id", "setup", "request", "error", "prompt", "prompt_token_ids", "completions", "usage")


@dataclass(frozen=True)
class JobRequest:
    """One input line.

    params: the parameters, with a seed. kept: fields that are copied to the output line. openai: the whole line, if it
    has the form of OpenAI's batch files. file: the name of the line's file, for errors.
    """

    line: int
    id: Any
    prompt: Prompt
    params: SamplingParams
    kept: Mapping[str, Any] = field(default_factory=dict)
    openai: Mapping[str, Any] | None = None
    file: str = "requests"

    def head(self, setup: str) -> dict[str, Any]:
        """Return the beginning of the output line, with digests of the models and of prompt and parameters."""
        # Fields at their default do not count, so that a job can continue in a version with more fields.
        values = {name: getattr(self.params, name) for name in FIELDS}
        parameters = {name: value for name, value in values.items() if value != DEFAULTS[name]}
        template = [arguments] if (arguments := arguments_of(self.prompt)) else []
        head = {"id": self.id, "setup": setup, "request": digest([self.prompt, parameters, *template]), **self.kept}
        return head if self.openai is None else openai.head_of(self.openai, head)


def line_seed(job_seed: int, line: int) -> int:
    """Return the seed of an input line, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{line}".encode()).digest()[:8], "little")


class LineParser:
    """Makes requests of lines. The arguments are those of `read_requests`.

    highest: the highest token id that the parameters of any line so far name; -1 if no line names one.

    Raises:
        ValueError: a name that cannot be kept, and `max_time` or `priority` in the defaults.
    """

    def __init__(self, file: str, defaults: SamplingParams, arms: int | Sequence[str], keep: Sequence[str]) -> None:
        if taken := [name for name in keep if name in (*OUTPUT_FIELDS, *FIELDS, *TEMPLATE_FIELDS)]:
            raise ValueError(f"keep={taken[0]!r}: expected a name that means nothing in input and output lines")
        for each in fields(SamplingParams):
            if each.name in MACHINE_FIELDS and (value := getattr(defaults, each.name)) != each.default:
                raise ValueError(
                    f"{each.name}={value!r}: expected {each.default!r} in a batch job, whose bytes would depend on the"
                    " machine"
                )
        self.file, self.defaults, self.arms, self.keep = file, defaults, arms, ("metadata", *keep)
        self._known = {"id", "prompt", *TEMPLATE_FIELDS, *self.keep, *FIELDS}
        self._seen: dict[str, SamplingParams] = {}
        self.highest = -1

    def check(self, row: Mapping[str, Any]) -> tuple[Any, Prompt]:
        """Return a line's id (None: it has none) and prompt, in a third of the time of `request`. Same errors."""
        return self._parts(row)[:2]

    def request(self, row: Mapping[str, Any], line: int) -> JobRequest:
        """Return the request of a line.

        Raises:
            TypeError, ValueError: naming the field, its value and what was expected.
        """
        _, prompt, params, own = self._parts(row)
        seed = own.get("seed")
        params = params.with_seed(line_seed(self.defaults.seed or 0, line) if seed is None else seed)
        kept = {name: own[name] for name in self.keep if name in own}
        source = None if own is row else row
        return JobRequest(line, own.get("id", line), prompt, params, kept, source, self.file)

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Prompt, SamplingParams, Mapping[str, Any]]:
        """Return id, prompt, parameters without the seed, and the line in this project's form."""
        if openai.is_openai(row):
            row = openai.request_of(row)
        if not self._known.issuperset(row):
            raise self._unknown(row)
        id, prompt, seed = row.get("id"), row.get("prompt"), row.get("seed")
        if not isinstance(id, str) or not id.isascii():
            _check_kept("id", id)
        for name in self.keep:
            if name in row:
                _check_kept(name, row[name])
        template = {name: row[name] for name in TEMPLATE_FIELDS if name in row}
        if template or not isinstance(prompt, str) or not prompt or not prompt.isascii() or may_be_stored(prompt):
            if not isinstance(prompt, (str, list)):
                raise ValueError(f"prompt={prompt!r:.60}: expected text, chat messages or token ids")
            (prompt,) = as_prompts([prompt], **template)
        if seed is not None:
            self.defaults.with_seed(seed)
        return id, prompt, self._params({name: row[name] for name in row if name in LINE_PARAMETERS}), row

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        """Return the parameters of a line. Most lines repeat some; checking them takes ten times all else."""
        key = repr(given)
        if (known := self._seen.get(key)) is not None:
            return known
        if given.get("logit_bias") is not None:
            given["logit_bias"] = _biases(given["logit_bias"])
        params = self.defaults.override(**given)
        if params.weights is not None:
            if isinstance(self.arms, int):
                check_weights(params.weights, self.arms)
            else:
                weights_per_arm(params.weights, self.arms, [0.0] * len(self.arms))
        self.highest = max(self.highest, _highest_token(params))
        if len(key) <= LONGEST_SEEN:
            if len(self._seen) == MOST_SEEN:
                self._seen.clear()
            self._seen[key] = params
        return params

    def _unknown(self, row: Mapping[str, Any]) -> ValueError:
        name, known = min(set(row) - self._known), ", ".join(("id", "prompt", *TEMPLATE_FIELDS, *self.keep, *FIELDS))
        return ValueError(
            f"{name}={row[name]!r:.60}: expected one of {known};"
            " other fields go to the output if they are named by --keep"
        )


def _highest_token(params: SamplingParams) -> int:
    """Return the highest token id that parameters name, -1 if they name none. `logprobs=n` counts as token n - 1."""
    named = (params.stop_token_ids, params.suppress_tokens, params.allowed_token_ids or (), params.logit_bias or ())
    return max((params.logprobs or 0) - 1, *(max(tokens, default=-1) for tokens in named))


def _check_kept(name: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # NaN, infinity or half a surrogate pair
        raise ValueError(
            f"{name}={value!r:.80}: expected what an output line can hold and a resumed job find"
        ) from None


def _biases(value: Any) -> dict[int, Any]:
    """Return biases with integer keys: JSON has only text as keys."""
    if not isinstance(value, dict) or not all(key.isdecimal() and str(int(key)) == key for key in value):
        raise ValueError(f"logit_bias={value!r:.200}: expected an object from token ids to numbers")
    return {int(key): bias for key, bias in value.items()}
