"""A request, checked before any work, and its sequences: one for each completion, from the queue to the output."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from genarm_fast.outputs import ArmRewards, Completion, GenerationOutput, Rounds, Timing, TokenLogprob, Usage
from genarm_fast.params import MAX_SEED, SamplingParams, Weight, weight_at
from genarm_fast.speculation.config import OFF, Speculation
from genarm_fast.text.detokenize import Detokenizer, StopStrings
from genarm_fast.text.given import Prompt

GOLDEN = 0x9E3779B97F4A7C15
_ids = itertools.count()


def sample_seed(seed: int, index: int) -> int:
    """Seed of a request's completion: the request's own for the first, SplitMix64 of it for the others.

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
    """A prompt with its parameters. `token_ids[i]` is the prompt as member i sees it, the draft model last.

    as_base: members that are the base itself and read the same prompt, so that its logits are theirs.
    """

    index: int
    prompt: Prompt
    token_ids: list[list[int]]
    params: SamplingParams
    weights: tuple[Weight, ...]
    stop_ids: frozenset[int]
    as_base: frozenset[int] = frozenset()

    @cached_property
    def starts(self) -> list[int]:
        """The position of the last token of the prompt, by member."""
        return [len(ids) - 1 for ids in self.token_ids]

    @cached_property
    def wants_logprobs(self) -> bool:
        return self.params.logprobs is not None or self.params.rewards

    @cached_property
    def penalised(self) -> bool:
        """Whether tokens that were there before are less likely, or more."""
        params = self.params
        return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0

    @cached_property
    def needs_host(self) -> bool:
        """Whether a next token depends on tokens that the host has to know first."""
        return self.penalised or bool(self.params.logits_processors)

    @cached_property
    def has_bias(self) -> bool:
        """Whether numbers are added to its combined logits, at some positions or at all."""
        params = self.params
        lists = (params.logit_bias, params.suppress_tokens, params.min_new_tokens)
        return any(lists) or params.allowed_token_ids is not None

    def sequences(self, tokenizer: Any, speculation: Speculation = OFF) -> list[Sequence]:
        """One sequence per completion."""
        seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        return [
            Sequence(self, sample_seed(seed, i), tokenizer, self.weights, speculation) for i in range(self.params.n)
        ]


class Reported(NamedTuple):
    """What a sequence reports of a token: its log-probability by the guided distribution, and by the members, base
    first; and the most probable tokens."""

    logprob: float
    members: list[float]
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """A completion in the making: what it says so far, and where the engine has it.

    weights: of the ARMs, each a number or one for each token. epoch: counts changes of the weights, so that what was
    drawn before one is told apart. unread: tokens of this epoch that are drawn on the device, but not read. stepwise:
    its reader takes one step at a time; held: the reader has not asked for the next step yet. slot: its place in the KV
    cache. cached[m]: how many tokens of prompt and response member m's cache holds. donor: the sequence in `donor_slot`
    that gives it the first `shared` tokens of its prompt. context: the caller's context variables, for its processors,
    which may run in another thread. owner: of the engine that it was given to.
    """

    request: Request
    seed: int
    tokenizer: Any
    weights: tuple[Weight, ...]
    speculation: Speculation = OFF
    id: int = field(default_factory=lambda: next(_ids))
    tokens: list[int] = field(default_factory=list)
    used_weights: list[tuple[float, ...]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)  # per token, one per ARM
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    context: Context = field(default_factory=copy_context)
    text: str = ""
    steps: int = 0
    drafted: int = 0  # tokens proposed, and how many of them were right
    accepted: int = 0
    # where the engine has it
    owner: object = None
    epoch: int = 0
    unread: int = 0
    stepwise: bool = False
    held: bool = False
    overtaken: int = 0  # how many sequences of higher priority have come before it in the queue
    slot: int = -1  # none
    cached: list[int] = field(default_factory=list)
    donor: Sequence | None = None
    donor_slot: int = 0
    shared: int = 0
    # clock readings, seconds; None where it did not come so far
    admitted: float | None = None
    prefilled: float | None = None
    advanced: float | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self._detokenizer = Detokenizer(
            self.tokenizer, self.request.token_ids[0], skip_special_tokens=params.skip_special_tokens
        )
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._weigh(self.weights)
        self.deadline = None if params.max_time is None else time.perf_counter() + params.max_time

    @property
    def remaining(self) -> int:
        """Tokens until the limit."""
        return self.request.params.max_new_tokens - len(self.tokens)

    @property
    def ended(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    def late(self, now: float) -> bool:
        """Whether its time is over at this reading of the clock, seconds."""
        return self.deadline is not None and now >= self.deadline

    def _weigh(self, weights: tuple[Weight, ...]) -> None:
        """Take ARM weights: for the next token and, of those that are one for each token, for all that follow.

        needed: members whose logits the next tokens depend on, or that it reports: the base, and ARMs by index + 1.
        """
        numbers = tuple(weight for weight in weights if not isinstance(weight, tuple))
        self.weights, self._constant = weights, numbers if len(numbers) == len(weights) else None
        rewards, as_base, done = self.request.params.rewards, self.request.as_base, len(self.tokens)
        arms = enumerate(weights, 1)
        self.needed = [0, *(m for m, weight in arms if m not in as_base and (rewards or _matters(weight, done)))]

    @property
    def base_line(self) -> tuple[float, ...]:
        """The coefficient of the base's log-probabilities for each token, with those of ARMs that are the base."""
        own = [(self.request.params.base_weight,), *(self.line(m) for m in self.request.as_base)]
        return tuple(sum(weight_at(line, i) for line in own) for i in range(max(map(len, own))))

    def line(self, member: int) -> tuple[float, ...]:
        """The weight of an ARM for each token, the last one for all that follow."""
        weight = self.weights[member - 1]
        return weight if isinstance(weight, tuple) else (weight,)

    @property
    def most_tokens(self) -> int:
        """Tokens that its slot must hold: of its longest prompt, as the members see it, and its longest response."""
        return max(map(len, self.request.token_ids)) + self.request.params.max_new_tokens

    def position(self, member: int) -> int:
        """Where member sees the last token, which the next step feeds; its cache needs all before that."""
        return self.request.starts[member] + len(self.tokens)

    def last_token(self, member: int) -> int:
        """The last token as a member sees it; before the first one of the response, prompts may differ in it."""
        return self.tokens[-1] if self.tokens else self.request.token_ids[member][-1]

    def text_of(self, member: int, start: int, end: int) -> list[int]:
        """Tokens of prompt and response from position `start` to before `end`, as member sees them."""
        prompt = self.request.token_ids[member]
        if end <= len(prompt):
            return prompt[start:end]
        return prompt[start:] + self.tokens[max(0, start - len(prompt)) : end - len(prompt)]

    def steer(self, weights: tuple[Weight, ...]) -> None:
        """Draw the next tokens with other ARM weights."""
        self._weigh(weights)
        self.epoch += 1
        self.unread = 0  # what is in flight is dropped

    def append(self, token: int, reported: Reported | None = None) -> None:
        """Append a token that was drawn with the weights as they are, and find out whether it ends the text."""
        params = self.request.params
        if self._constant is not None:
            self.used_weights.append(self._constant)
            self.tokens.append(token)
        else:
            self.used_weights.append(tuple(weight_at(weight, len(self.tokens)) for weight in self.weights))
            self.tokens.append(token)
            self._weigh(self.weights)
        if reported is not None:
            if params.logprobs is not None:
                self.logprobs.append(TokenLogprob(reported.logprob, reported.top))
            if params.rewards:
                self.rewards.append(reported.members[1:])
        stop = token in self.request.stop_ids
        if not stop or params.include_stop_str_in_output:
            self._show(self._detokenizer.push(token))
        if stop:
            self.finish("stop", token)
        elif self.finish_reason is None and len(self.tokens) == params.max_new_tokens:
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

    def completion(self, arm_names: list[str]) -> Completion:
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


def members_of(sequences: list[Sequence]) -> tuple[int, ...]:
    """Members that any of the sequences needs."""
    return tuple(sorted(set().union(*[sequence.needed for sequence in sequences])))


def output_of(sequences: list[Sequence], arm_names: list[str]) -> GenerationOutput:
    """The output of one request, from its sequences."""
    request = sequences[0].request
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    start = _first(sequence.admitted for sequence in sequences)
    # A sequence that was closed in mid-prefill, or before it, has spent no time on what comes after.
    ends = [sequence.advanced for sequence in sequences if sequence.advanced is not None]
    prefilled = _first(sequence.prefilled for sequence in sequences)
    prefill = prefilled - start if prefilled is not None and start is not None else 0.0
    decode = max(ends) - prefilled if ends and prefilled is not None else 0.0
    return GenerationOutput(
        prompt=request.prompt,
        prompt_token_ids=list(request.token_ids[0]),
        completions=[sequence.completion(arm_names) for sequence in sequences],
        usage=Usage(len(request.token_ids[0]), tokens),
        timing=Timing(prefill, decode, tokens / decode if decode > 0 else 0.0),
        rounds=Rounds(*(sum(getattr(each, name) for each in sequences) for name in ("steps", "drafted", "accepted"))),
    )


def _matters(weight: Weight, position: int) -> bool:
    """Whether an ARM has a say from the token at this place on."""
    if isinstance(weight, float):
        return weight != 0
    return any(weight[min(position, len(weight) - 1) :])


def _first(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)
