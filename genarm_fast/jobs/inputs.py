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
from typing import Any

from genarm_fast.jobs import openai
from genarm_fast.jobs.identity import digest
from genarm_fast.params import SamplingParams, check_weights, weights_per_arm
from genarm_fast.text.chats import arguments_of
from genarm_fast.text.given import Prompt, as_prompts
from genarm_fast.text.messages import may_be_stored

OF_THE_MACHINE = ("max_time", "priority")  # with these an answer would depend on the time of day
# What JSON can express, less those.
DEFAULTS = {
    field.name: field.default
    for field in fields(SamplingParams)
    if field.name not in ("logits_processors", *OF_THE_MACHINE)
}
FIELDS = tuple(DEFAULTS)
TEMPLATE = ("tools", "chat_template_kwargs")
CHECKED = {*FIELDS} - {"seed"}  # lines differ in it
MOST_SEEN, LONGEST_SEEN = 1024, 1024  # sets of parameters, and characters of one, that are remembered
OUTPUT = ("id", "setup", "request", "error", "prompt", "prompt_token_ids", "completions", "usage")


@dataclass(frozen=True)
class JobRequest:
    """One input line. `params` has a seed. kept: fields that its output line has too. openai: the line, if it is one of
    OpenAI's batch files. file: where the line is, for errors."""

    line: int
    id: Any
    prompt: Prompt
    params: SamplingParams
    kept: Mapping[str, Any] = field(default_factory=dict)
    openai: Mapping[str, Any] | None = None
    file: str = "requests"

    def head(self, setup: str) -> dict[str, Any]:
        """What its output line begins with: `setup` stands for the models, `request` for prompt and parameters."""
        # Fields at their default do not count, so that a job outlives a version with more fields.
        values = {name: getattr(self.params, name) for name in FIELDS}
        parameters = {name: value for name, value in values.items() if value != DEFAULTS[name]}
        template = [arguments] if (arguments := arguments_of(self.prompt)) else []
        head = {"id": self.id, "setup": setup, "request": digest([self.prompt, parameters, *template]), **self.kept}
        return head if self.openai is None else openai.head_of(self.openai, head)


def line_seed(job_seed: int, line: int) -> int:
    """The seed of an input line, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{line}".encode()).digest()[:8], "little")


class Form:
    """Makes requests of lines. Arguments as in `read_requests`.

    highest: the highest token id that the parameters of any line so far name, -1 where they name none.

    Raises ValueError for a name that cannot be kept, and for `max_time` or `priority` in the defaults.
    """

    def __init__(self, file: str, defaults: SamplingParams, arms: int | Sequence[str], keep: Sequence[str]) -> None:
        if taken := [name for name in keep if name in (*OUTPUT, *FIELDS, *TEMPLATE)]:
            raise ValueError(f"keep={taken[0]!r}: expected a name that means nothing in input and output lines")
        for each in fields(SamplingParams):
            if each.name in OF_THE_MACHINE and (value := getattr(defaults, each.name)) != each.default:
                raise ValueError(
                    f"{each.name}={value!r}: expected {each.default!r} in a batch job, whose bytes would depend on the"
                    " machine"
                )
        self.file, self.defaults, self.arms, self.keep = file, defaults, arms, ("metadata", *keep)
        self._known = {"id", "prompt", *TEMPLATE, *self.keep, *FIELDS}
        self._seen: dict[str, SamplingParams] = {}
        self.highest = -1

    def check(self, row: Mapping[str, Any]) -> tuple[Any, Prompt]:
        """A line's id (None: it has none) and prompt, in a third of the time of `request`. Raises as that does."""
        return self._parts(row)[:2]

    def request(self, row: Mapping[str, Any], line: int) -> JobRequest:
        """Raises TypeError, ValueError: naming the field, its value and what was expected."""
        _, prompt, params, own = self._parts(row)
        seed = own.get("seed")
        params = params.with_seed(line_seed(self.defaults.seed or 0, line) if seed is None else seed)
        kept = {name: own[name] for name in self.keep if name in own}
        source = None if own is row else row
        return JobRequest(line, own.get("id", line), prompt, params, kept, source, self.file)

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Prompt, SamplingParams, Mapping[str, Any]]:
        """Id, prompt, parameters but for the seed, and the line as this project has it."""
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
        template = {name: row[name] for name in TEMPLATE if name in row}
        if template or not isinstance(prompt, str) or not prompt or not prompt.isascii() or may_be_stored(prompt):
            if not isinstance(prompt, (str, list)):
                raise ValueError(f"prompt={prompt!r:.60}: expected text, chat messages or token ids")
            (prompt,) = as_prompts([prompt], **template)
        if seed is not None:
            self.defaults.with_seed(seed)
        return id, prompt, self._params({name: row[name] for name in row if name in CHECKED}), row

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        """Most lines have the parameters of others: checking them takes ten times as long as all else."""
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
        name, known = min(set(row) - self._known), ", ".join(("id", "prompt", *TEMPLATE, *self.keep, *FIELDS))
        return ValueError(
            f"{name}={row[name]!r:.60}: expected one of {known};"
            " other fields go to the output if they are named by --keep"
        )


def _highest_token(params: SamplingParams) -> int:
    """The highest token id that parameters name, -1 where they name none; `logprobs` asks for as many tokens."""
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
    """JSON has only text as keys."""
    if not isinstance(value, dict) or not all(key.isdecimal() and str(int(key)) == key for key in value):
        raise ValueError(f"logit_bias={value!r:.200}: expected an object from token ids to numbers")
    return {int(key): bias for key, bias in value.items()}
