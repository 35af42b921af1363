"""A request, checked before any work, and the rows that it becomes: one for each completion."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from genarm_fast.outputs import ArmRewards, Completion, GenerationOutput, Rounds, Timing, TokenLogprob, Usage
from genarm_fast.params import MAX_SEED, SamplingParams
from genarm_fast.text.detokenize import Detokenizer, StopStrings
from genarm_fast.text.prompts import Prompt

GOLDEN = 0x9E3779B97F4A7C15


def sample_seed(seed: int, index: int) -> int:
    """Seed of a request's completion: its own for the first, SplitMix64 of it for the others.

    So each completion is what the request gives alone with the seed that the completion reports.
    """
    if index == 0:
        return seed
    z = (seed + index * GOLDEN) & MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return z ^ (z >> 31)


@dataclass
class Request:
    """A prompt with its parameters. `token_ids[i]` is the prompt as member i sees it."""

    index: int
    prompt: Prompt
    token_ids: list[list[int]]
    params: SamplingParams
    weights: tuple[float, ...]
    stop_ids: frozenset[int]

    def rows(self, tokenizer: Any) -> list[Row]:
        """One row per completion."""
        seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        return [Row(self, sample_seed(seed, i), tokenizer, self.weights) for i in range(self.params.n)]


@dataclass
class Draw:
    """What was sampled for one row at one position."""

    token: int
    logprob: float = 0.0
    member_logprobs: Sequence[float] = ()  # base, then every ARM that ran
    top: dict[int, float] = field(default_factory=dict)


@dataclass
class Row:
    """A completion in the making."""

    request: Request
    seed: int
    tokenizer: Any
    weights: tuple[float, ...]  # of the next token; a stream may change them
    tokens: list[int] = field(default_factory=list)
    used_weights: list[tuple[float, ...]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rewards: list[Sequence[float]] = field(default_factory=list)  # per token, one per ARM
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    text: str = ""
    rounds: int = 0
    drafted: int = 0  # tokens proposed, and how many of them were right
    accepted: int = 0
    # clock readings, seconds
    arrived: float = 0.0
    prefilled: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)
        self._stops = StopStrings(self.request.params.stop)

    @property
    def wants_logprobs(self) -> bool:
        return self.request.params.logprobs is not None or self.request.params.rewards

    @property
    def remaining(self) -> int:
        """Tokens until the limit."""
        return self.request.params.max_new_tokens - len(self.tokens)

    @property
    def ended(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    def settle(self, draw: Draw) -> None:
        """Append a token and find out whether it ends the text."""
        params = self.request.params
        self.tokens.append(draw.token)
        self.used_weights.append(self.weights)
        if params.logprobs is not None:
            self.logprobs.append(TokenLogprob(draw.logprob, draw.top))
        if params.rewards:
            self.rewards.append(draw.member_logprobs[1:])
        if draw.token in self.request.stop_ids:
            self.finish("stop", draw.token)
        else:
            self._show(self._detokenizer.push(draw.token))
            if self.finish_reason is None and len(self.tokens) == params.max_new_tokens:
                self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End the text here, with what was held back of it."""
        self._show(self._detokenizer.flush())
        if self.finish_reason is None:  # the last characters may have completed a stop string
            self.finish_reason, self.stop_reason = reason, stop_reason
            self.text += self._stops.flush()

    def _show(self, piece: str) -> None:
        self.text += self._stops.push(piece)
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found

    def completion(self, arm_names: Sequence[str]) -> Completion:
        """The completion as it stands; "cancelled" where it is not finished."""
        params = self.request.params
        return Completion(
            text=self.text,
            token_ids=list(self.tokens),
            finish_reason=self.finish_reason or "cancelled",
            stop_reason=self.stop_reason,
            seed=self.seed,
            weights=list(self.used_weights),
            logprobs=list(self.logprobs) if params.logprobs is not None else None,
            rewards={name: ArmRewards([token[i] for token in self.rewards]) for i, name in enumerate(arm_names)}
            if params.rewards
            else None,
        )


def output_of(rows: Sequence[Row], arm_names: Sequence[str]) -> GenerationOutput:
    """The output of one request, from its rows."""
    request = rows[0].request
    tokens = sum(len(row.tokens) for row in rows)
    prefilled = min(row.prefilled for row in rows)
    decode_time = max(row.finished for row in rows) - prefilled
    return GenerationOutput(
        prompt=request.prompt,
        prompt_token_ids=list(request.token_ids[0]),
        completions=[row.completion(arm_names) for row in rows],
        usage=Usage(len(request.token_ids[0]), tokens),
        timing=Timing(prefilled - rows[0].arrived, decode_time, tokens / decode_time if decode_time > 0 else 0.0),
        rounds=Rounds(*(sum(getattr(row, name) for row in rows) for name in ("rounds", "drafted", "accepted"))),
    )
