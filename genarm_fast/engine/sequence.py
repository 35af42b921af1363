"""Requests, which are checked before any work, and their sequences: one per completion, from queue to output."""

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

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_ids = itertools.count()


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of a request's completion: the request's own for the first, SplitMix64 of it for the others.

    A request with n = 1 and the seed that a completion reports gives that completion.
    """
    if index == 0:
        return seed
    z = (seed + index * GOLDEN_GAMMA) & MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return z ^ (z >> 31)


@dataclass
class Request:
    """A prompt with its parameters. `token_ids[i]` is the prompt as member i sees it, the draft model last.

    as_base: indices of ARMs that are the base model itself and read the same prompt, so they need no own forward.
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
        """The position of the prompt's last token, by member."""
        return [len(ids) - 1 for ids in self.token_ids]

    @cached_property
    def wants_logprobs(self) -> bool:
        return self.params.logprobs is not None or self.params.rewards

    @cached_property
    def penalised(self) -> bool:
        """Whether a penalty changes the probabilities of tokens that the text already has."""
        params = self.params
        return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0

    @cached_property
    def needs_host(self) -> bool:
        """Whether the host has to know the tokens so far before it can draw the next one."""
        return self.penalised or bool(self.params.logits_processors)

    @cached_property
    def has_bias(self) -> bool:
        """Whether numbers are added to the combined logits, at some positions at least."""
        params = self.params
        lists = (params.logit_bias, params.suppress_tokens, params.min_new_tokens)
        return any(lists) or params.allowed_token_ids is not None

    def sequences(self, tokenizer: Any, speculation: Speculation = OFF) -> list[Sequence]:
        """Return new sequences, one per completion."""
        seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        return [
            Sequence(self, sample_seed(seed, i), tokenizer, self.weights, speculation) for i in range(self.params.n)
        ]


class Reported(NamedTuple):
    """Log-probabilities that a sequence reports of a token: guided, by the members, base first, and the top tokens."""

    logprob: float
    members: list[float]
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """A completion in the making: its text so far, and its place in the engine.

    weights: the ARMs' weights, each a number or one for each token. epoch: number of changes of weights or slot; tokens
    of an earlier epoch are dropped. unread: tokens of this epoch that are drawn on the device but not read. stepwise:
    whether its reader takes one step at a time. held: whether the reader has not asked for the next step. slot: its
    place in the KV cache. cached[m]: tokens of prompt and response that member m's cache holds. donor: the sequence in
    `donor_slot` whose cache gives it the first `shared` tokens. context: the caller's context variables, for its
    processors, which may run in another thread. owner: mark of the engine that has it.
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
    rewards: list[list[float]] = field(default_factory=list)  # for each token, one number per ARM
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    context: Context = field(default_factory=copy_context)
    text: str = ""
    steps: int = 0
    drafted: int = 0  # drafts that were proposed; `accepted` counts those that were right
    accepted: int = 0
    # Its place in the engine:
    owner: object = None
    epoch: int = 0
    unread: int = 0
    stepwise: bool = False
    held: bool = False
    overtaken: int = 0  # number of sequences of higher priority that were queued before it
    slot: int = -1  # -1: it has no slot
    cached: list[int] = field(default_factory=list)
    donor: Sequence | None = None
    donor_slot: int = 0
    shared: int = 0
    # Times of events, in seconds of `perf_counter`; None before the event.
    admitted: float | None = None
    prefilled: float | None = None
    advanced: float | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self._detokenizer = Detokenizer(
            self.tokenizer, self.request.token_ids[0], skip_special_tokens=params.skip_special_tokens
        )
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._set_weights(self.weights)
        self.deadline = None if params.max_time is None else time.perf_counter() + params.max_time

    @property
    def remaining(self) -> int:
        """Number of tokens until `max_new_tokens`."""
        return self.request.params.max_new_tokens - len(self.tokens)

    @property
    def ended(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    def is_late(self, now: float) -> bool:
        """Whether its time is over at this reading of the clock, seconds."""
        return self.deadline is not None and now >= self.deadline

    def _set_weights(self, weights: tuple[Weight, ...]) -> None:
        """Set the ARM weights, and `needed`: members whose logits matter from the next token on, base first.

        These are the base, and ARMs (index + 1) whose weight is not 0 from there on or whose rewards are wanted. ARMs
        that are the base itself are left out.
        """
        numbers = tuple(weight for weight in weights if not isinstance(weight, tuple))
        self.weights, self._constant_weights = weights, numbers if len(numbers) == len(weights) else None
        rewards, as_base, done = self.request.params.rewards, self.request.as_base, len(self.tokens)
        arms = enumerate(weights, 1)
        self.needed = [0, *(m for m, weight in arms if m not in as_base and (rewards or _counts_from(weight, done)))]

    @property
    def base_token_weights(self) -> tuple[float, ...]:
        """The base's coefficient for each token, to which the weights of ARMs that are the base itself are added."""
        own = [(self.request.params.base_weight,), *(self.token_weights(m) for m in self.request.as_base)]
        return tuple(sum(weight_at(each, i) for each in own) for i in range(max(map(len, own))))

    def token_weights(self, member: int) -> tuple[float, ...]:
        """Return an ARM's weight for each token; the last one counts for all that follow."""
        weight = self.weights[member - 1]
        return weight if isinstance(weight, tuple) else (weight,)

    @property
    def most_tokens(self) -> int:
        """Tokens that its slot must hold: those of the longest prompt of any member, and of the longest response."""
        return max(map(len, self.request.token_ids)) + self.request.params.max_new_tokens

    def position(self, member: int) -> int:
        """Return the last token's position for a member. The next step feeds that token; the cache needs all before."""
        return self.request.starts[member] + len(self.tokens)

    def last_token(self, member: int) -> int:
        """Return the last token as a member sees it; before the response begins, it may differ between members."""
        return self.tokens[-1] if self.tokens else self.request.token_ids[member][-1]

    def text_of(self, member: int, start: int, end: int) -> list[int]:
        """Return the tokens of prompt and response at positions `start` to `end` - 1, as a member sees them."""
        prompt = self.request.token_ids[member]
        if end <= len(prompt):
            return prompt[start:end]
        return prompt[start:] + self.tokens[max(0, start - len(prompt)) : end - len(prompt)]

    def steer(self, weights: tuple[Weight, ...]) -> None:
        """Draw the next tokens with other ARM weights."""
        self._set_weights(weights)
        self.epoch += 1
        self.unread = 0  # tokens in flight will be dropped

    def append(self, token: int, reported: Reported | None = None) -> None:
        """Append a token that was drawn with the present weights, and find out whether it ends the text."""
        params = self.request.params
        if self._constant_weights is not None:
            self.used_weights.append(self._constant_weights)
            self.tokens.append(token)
        else:
            self.used_weights.append(tuple(weight_at(weight, len(self.tokens)) for weight in self.weights))
            self.tokens.append(token)
            self._set_weights(self.weights)
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
        """End the text here, and add the characters that were held back."""
        self._show(self._detokenizer.flush())
        if self.finish_reason is None:  # else these characters completed a stop string
            self.finish_reason, self.stop_reason = reason, stop_reason
            self.text += self._stops.flush()

    def _show(self, piece: str) -> None:
        self.text += self._stops.push(piece)
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found

    def completion(self, arm_names: list[str]) -> Completion:
        """Return the completion so far. Its finish_reason is "cancelled" if it has not ended."""
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
    """Return the members that any of the sequences needs, sorted."""
    return tuple(sorted(set().union(*[sequence.needed for sequence in sequences])))


def output_of(sequences: list[Sequence], arm_names: list[str]) -> GenerationOutput:
    """Return the output of one request from its sequences."""
    request = sequences[0].request
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    start = _earliest(sequence.admitted for sequence in sequences)
    # A sequence that was closed before a stage has no time of that stage, which counts as 0 seconds.
    ends = [sequence.advanced for sequence in sequences if sequence.advanced is not None]
    prefilled = _earliest(sequence.prefilled for sequence in sequences)
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


def _counts_from(weight: Weight, position: int) -> bool:
    """Whether an ARM's weight is other than 0 for the token at this position or a later one."""
    if isinstance(weight, float):
        return weight != 0
    return any(weight[min(position, len(weight) - 1) :])


def _earliest(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)
