"""What one request asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Order of effects, as in Hugging Face and vLLM: combine members, repetition penalty, logit bias, `min_new_tokens`,
    `logits_processors`, temperature, top-k, top-p, min-p, sample. All of them act on the normalised log-probabilities
    of the combination.

    Args:
        weights: one weight per ARM (the paper's 1/β), any finite real; a number stands for every ARM; None takes each
            ARM's own default weight.
        temperature: T in p ∝ exp((log π_base + Σ w_i log π_arm_i)/T); 0 is greedy, ties go to the lowest token id.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens below min_p times the largest probability, in [0, 1].
        max_new_tokens: at most so many tokens are generated.
        min_new_tokens: end-of-sequence and stop token ids are impossible before so many tokens.
        stop: strings that end the text; they are not part of it, wherever token borders fall.
        stop_token_ids: token ids that end the text, besides the model's own end-of-sequence ids.
        ignore_eos: do not stop at the end-of-sequence ids.
        seed: 0..2**64-1. The same request with the same seed gives the same tokens in any batch. None draws one, and
            the output reports it.
        n: number of completions of the prompt.
        logprobs: None for none; k for the log-probability of each token and of the k most probable ones, under the
            guided distribution at this temperature (T = 1 when greedy), after penalties and before top-k/top-p/min-p.
        rewards: report log π_arm of every generated token, per ARM.
        repetition_penalty: the log-probability of a token seen in prompt or output is multiplied by it.
        logit_bias: token id → number added to its combined log-probability; -inf bans it.
        logits_processors: Hugging Face `LogitsProcessor`s or callables `(input_ids [1, t], scores [1, V]) -> scores`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """

    weights: float | Sequence[float] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    rewards: bool = False
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[Callable[..., Any]] = field(default=())

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", check_weights(self.weights))
        _real("temperature", self.temperature, 0.0, math.inf, "a finite number >= 0")
        _integer("top_k", self.top_k, 0, "an integer >= 0 (0 keeps all tokens)")
        _real("top_p", self.top_p, 0.0, 1.0, "a number in (0, 1]", open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
        _integer("max_new_tokens", self.max_new_tokens, 1, "an integer >= 1")
        _integer("min_new_tokens", self.min_new_tokens, 0, "an integer >= 0")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: expected at most max_new_tokens={self.max_new_tokens}"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r}: expected non-empty strings, got {text!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, "token ids >= 0")
        if self.seed is not None:
            _integer("seed", self.seed, 0, "an integer in 0..2**64-1", high=MAX_SEED)
        _integer("n", self.n, 1, "an integer >= 1")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, "None or an integer >= 0")
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "a finite number > 0", open_low=True)
        if self.logit_bias is not None:
            for token, bias in self.logit_bias.items():
                _integer("logit_bias", token, 0, "token ids >= 0 as keys")
                if not isinstance(bias, Real) or math.isnan(bias) or bias == math.inf:
                    raise ValueError(f"logit_bias[{token}]={bias!r}: expected a finite number or -inf")
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        for processor in self.logits_processors:
            if not callable(processor):
                raise TypeError(f"logits_processors: expected callables, got {processor!r}")

    def override(self, **overrides: Any) -> SamplingParams:
        """A copy with some fields replaced. Raises TypeError for a name that is not a field."""
        unknown = sorted(set(overrides) - set(self.__slots__))
        if unknown:
            raise TypeError(f"unknown sampling parameter {unknown[0]!r}: expected one of {', '.join(self.__slots__)}")
        return replace(self, **overrides)


def check_weights(weights: object, count: int | None = None) -> float | tuple[float, ...]:
    """Finite ARM weights: a number for all ARMs, or one for each of `count` ARMs."""
    if isinstance(weights, Real) and not isinstance(weights, bool):
        values: tuple[Any, ...] = (weights,)
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        values = tuple(weights)
    elif hasattr(weights, "tolist"):  # tensors and arrays
        return check_weights(weights.tolist(), count)
    else:
        raise TypeError(f"weights={weights!r}: expected a number or a sequence of numbers")
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"weights={weights!r}: expected finite numbers, got {value!r}")
    if isinstance(weights, Real):
        return float(weights)
    if count is not None and len(values) != count:
        raise ValueError(f"weights={weights!r}: expected {count} numbers, one per ARM, got {len(values)}")
    return tuple(float(value) for value in values)


def _real(name: str, value: object, low: float, high: float, expected: str, *, open_low: bool = False) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected {expected}")
    number = float(value)
    if not math.isfinite(number) or number < low or number > high or (open_low and number == low):
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _integer(name: str, value: object, low: int, expected: str, *, high: int | None = None) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected {expected}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}={value!r}: expected {expected}")
