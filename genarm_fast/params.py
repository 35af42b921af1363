"""Sampling parameters of a request, and the checks of their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from genarm_fast.utils.checks import LARGEST, check_flag, check_integer, check_real, is_finite, number, shown, too_large

MAX_SEED = 2**64 - 1
MAX_PRIORITY = 2**31
Weight = float | tuple[float, ...]  # an ARM's weight, or one number for each token, the last one for all that follow
AnyWeight = float | Sequence[float]
AnyWeights = float | Sequence[AnyWeight] | Mapping[str, AnyWeight]  # one for all ARMs, one for each, or some by name


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Order of effects, as in Hugging Face and vLLM: combine members, repetition, frequency and presence penalty, logit
    bias and tokens that are ruled out, `logits_processors`, temperature, top-k, top-p, min-p, sample. All of them act
    on the normalised log-probabilities of the combination. None means the default, for every parameter. Numbers that
    act on scores are at most 1e30 in size.

    Args:
        weights: one weight per ARM (the paper's 1/β), any real numbers. A single number is the weight of every ARM. A
            mapping from names to numbers sets the weights of those ARMs alone. None takes each ARM's default weight.
            In the place of an ARM's number, a list has one for each token of the response; the last number repeats.
        base_weight: coefficient of log π_base, any real. Tokens that the base masks stay impossible.
        temperature: T in p ∝ exp((log π_base + Σ w_i log π_arm_i)/T); 0 is greedy, ties go to the lowest token id.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens below min_p times the largest probability, in [0, 1].
        max_new_tokens: most tokens that are generated.
        min_new_tokens: number of tokens before which end-of-sequence and stop token ids are impossible.
        max_time: seconds after which the text ends where it is, with finish_reason "time". They count from the call
            on, and include the time that the request waits for a slot.
        priority: requests with a larger number get slots first. Others may overtake a waiting request 64 times at most.
        stop: strings that end the text and are left out of it. They are found across token borders too.
        include_stop_str_in_output: keep the stop string, or the text of the stop token, at the end of the text.
        stop_token_ids: token ids that end the text, besides the model's own end-of-sequence ids.
        ignore_eos: do not stop at the end-of-sequence ids.
        skip_special_tokens: leave special tokens out of the text; `token_ids` has them in any case.
        seed: 0..2**64-1. The same request with the same seed gives the same tokens in any batch. With None a seed is
            drawn at random, and the output reports it.
        n: number of completions of the prompt.
        logprobs: None reports no log-probabilities. A number k reports those of each drawn token and of the k most
            probable tokens. They are under the guided distribution at this temperature (T = 1 when greedy), after
            penalties and before top-k/top-p/min-p.
        rewards: report log π_arm of every generated token, per ARM.
        repetition_penalty: factor of the log-probability of every token that is in the prompt or the output so far.
        frequency_penalty: number subtracted from a token's log-probability once for each time that the output has it.
        presence_penalty: number subtracted once from the log-probability of every token that the output has.
        logit_bias: token id → number added to its combined log-probability; -inf bans it.
        allowed_token_ids: the only tokens that are possible; stop tokens are no exception. None allows all.
        suppress_tokens: token ids that are impossible.
        logits_processors: Hugging Face `LogitsProcessor`s or callables `(input_ids [1, t], scores [1, V]) -> scores`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """

    weights: AnyWeights | None = None
    base_weight: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    max_time: float | None = None
    priority: int = 0
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    rewards: bool = False
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    suppress_tokens: Sequence[int] = ()
    logits_processors: Sequence[Callable[..., Any]] = field(default=())

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) is None:  # None means the default, as in Hugging Face and vLLM
                object.__setattr__(self, each.name, each.default)
        checked: dict[str, Any] = {
            "weights": None if self.weights is None else check_weights(self.weights),
            "base_weight": check_real("base_weight", self.base_weight, "a finite number", -math.inf),
            "temperature": check_real("temperature", self.temperature, "a finite number >= 0", 0.0),
            "top_k": check_integer("top_k", self.top_k, "an integer >= 0 (0 keeps all tokens)", 0),
            "top_p": check_real("top_p", self.top_p, "a number in (0, 1]", 0.0, 1.0, open_low=True),
            "min_p": check_real("min_p", self.min_p, "a number in [0, 1]", 0.0, 1.0),
            "max_new_tokens": check_integer("max_new_tokens", self.max_new_tokens, "an integer >= 1", 1),
            "min_new_tokens": check_integer("min_new_tokens", self.min_new_tokens, "an integer >= 0", 0),
            "max_time": None
            if self.max_time is None
            else check_real("max_time", self.max_time, "finite seconds > 0", 0.0, open_low=True),
            "priority": check_integer(
                "priority", self.priority, "an integer in -2**31..2**31", -MAX_PRIORITY, high=MAX_PRIORITY
            ),
            "stop": _texts("stop", self.stop),
            "include_stop_str_in_output": check_flag("include_stop_str_in_output", self.include_stop_str_in_output),
            "stop_token_ids": _tokens("stop_token_ids", self.stop_token_ids),
            "ignore_eos": check_flag("ignore_eos", self.ignore_eos),
            "skip_special_tokens": check_flag("skip_special_tokens", self.skip_special_tokens),
            "seed": _optional("seed", self.seed, "an integer in 0..2**64-1", 0, high=MAX_SEED),
            "n": check_integer("n", self.n, "an integer >= 1", 1),
            "logprobs": _optional("logprobs", self.logprobs, "None or an integer >= 0", 0),
            "rewards": check_flag("rewards", self.rewards),
            "repetition_penalty": check_real(
                "repetition_penalty", self.repetition_penalty, "a finite number > 0, 1e-30 at least", 1 / LARGEST
            ),
            "frequency_penalty": check_real("frequency_penalty", self.frequency_penalty, "a finite number", -math.inf),
            "presence_penalty": check_real("presence_penalty", self.presence_penalty, "a finite number", -math.inf),
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
            "allowed_token_ids": None
            if self.allowed_token_ids is None
            else _tokens("allowed_token_ids", self.allowed_token_ids),
            "suppress_tokens": _tokens("suppress_tokens", self.suppress_tokens),
            "logits_processors": _items("logits_processors", self.logits_processors, "a list of callables"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: expected at most max_new_tokens={self.max_new_tokens}"
            )
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids=(): expected a token id at least, or None for all")
        if self.allowed_token_ids is not None:
            banned = {*self.suppress_tokens, *(t for t, b in (self.logit_bias or {}).items() if b == -math.inf)}
            if banned.issuperset(self.allowed_token_ids):
                raise ValueError(
                    f"allowed_token_ids={self.allowed_token_ids!r:.80}: expected one that suppress_tokens and"
                    " logit_bias leave possible"
                )
        for processor in self.logits_processors:
            if not callable(processor):
                raise TypeError(f"logits_processors: expected callables, got {shown(processor)}")

    def override(self, **overrides: Any) -> SamplingParams:
        """Return a copy with some fields replaced. Raises TypeError for a name that is not a field."""
        unknown = sorted(set(overrides) - set(self.__slots__))
        if unknown:
            raise TypeError(f"unknown sampling parameter {unknown[0]!r}: expected one of {', '.join(self.__slots__)}")
        return replace(self, **overrides)

    def with_seed(self, seed: int) -> SamplingParams:
        """Return a copy with another seed. Only the seed is checked, in a tenth of the time that `override` takes."""
        seeded = object.__new__(SamplingParams)
        for name in self.__slots__:
            object.__setattr__(seeded, name, getattr(self, name))
        object.__setattr__(seeded, "seed", check_integer("seed", seed, "an integer in 0..2**64-1", 0, high=MAX_SEED))
        return seeded


def check_weights(weights: object, count: int | None = None) -> float | tuple[Weight, ...] | dict[str, Weight]:
    """Return checked ARM weights: a number for all ARMs, one for each of `count` ARMs, or numbers by name.

    In the place of an ARM's number there may be a list with a number for each token.

    Raises:
        TypeError, ValueError: weights of another form, not finite, or not as many as `count`.
    """
    if isinstance(weights, Mapping):
        if not all(isinstance(name, str) for name in weights):
            raise TypeError(f"weights={shown(weights)}: expected names of ARMs as keys")
        return dict(zip(weights, _weights(weights, weights.values())))
    if isinstance(weights, Real) and not isinstance(weights, bool):
        values: tuple[Any, ...] = (weights,)
    elif isinstance(weights, Sequence) and not isinstance(weights, (str, bytes)):
        values = tuple(weights)
    elif hasattr(weights, "tolist"):  # tensors and arrays
        return check_weights(weights.tolist(), count)
    else:
        raise TypeError(f"weights={shown(weights)}: expected a number, a sequence of numbers, or numbers by name")
    checked = _weights(weights, values)
    if isinstance(weights, Real):
        return checked[0]
    if count is not None and len(values) != count:
        expected = f"{count} number{'s' * (count != 1)}, one per ARM, got {len(values)}"
        raise ValueError(
            f"weights={shown(weights)}: expected {expected} (a list per token goes in the place of a number)"
        )
    return checked


def _weights(weights: object, values: Iterable[Any]) -> tuple[Any, ...]:
    checked: list[Any] = []
    for value in values:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (list, tuple)):
            each = [number.tolist() if hasattr(number, "tolist") else number for number in value]
            if not each or any(isinstance(number, (list, tuple)) for number in each):
                raise ValueError(f"weights={shown(weights)}: expected a number for each token, got {shown(value)}")
            line = tuple(_weight(weights, number) for number in each)
            checked.append(line if len(set(line)) > 1 else line[0])
        else:
            checked.append(_weight(weights, value))
    return tuple(checked)


def _weight(weights: object, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not is_finite(value):
        expected = f"finite numbers{too_large(value)}"
        raise ValueError(f"weights={shown(weights)}: expected {expected}, got {shown(value)}")
    return float(value)


def weight_at(weight: Weight, position: int) -> float:
    """Return an ARM's weight for the token at this position of the response."""
    return weight[min(position, len(weight) - 1)] if isinstance(weight, tuple) else weight


def weights_per_arm(weights: object, names: Sequence[str], others: Sequence[Weight]) -> tuple[Weight, ...]:
    """Return one weight for each ARM in `names`: a number, or one for each token. A single number counts for all ARMs.

    others: weights of the ARMs that a mapping of names leaves out.

    Raises:
        ValueError, TypeError: naming the weights and what was expected.
    """
    checked = check_weights(weights, len(names))
    if isinstance(checked, dict):
        if unknown := [name for name in checked if name not in names]:
            known = ", ".join(map(repr, names)) or "no name, since there is no ARM"
            raise ValueError(f"weights: {unknown[0]!r}: expected {known}")
        return tuple(checked.get(name, other) for name, other in zip(names, others))
    return checked if isinstance(checked, tuple) else (checked,) * len(names)


def _optional(name: str, value: object, expected: str, low: int, *, high: int | None = None) -> int | None:
    return None if value is None else check_integer(name, value, expected, low, high=high)


def _items(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"{name}={shown(value)}: expected {expected}")
    return tuple(value)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    return tuple(
        check_integer(name, token, "token ids >= 0", 0) for token in _items(name, value, "a list of token ids")
    )


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else _items(name, value, "a string or a list of strings")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}={shown(value)}: expected non-empty strings, got {shown(text)}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # decoded text never holds half a surrogate pair
            raise ValueError(f"{name}={shown(value)}: expected Unicode text, got half a surrogate pair in it")
    return texts


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias={shown(value)}: expected a mapping from token ids to numbers")
    biases = {}
    for token, bias in value.items():
        bias = number(bias)
        if not isinstance(bias, Real) or isinstance(bias, bool) or not (is_finite(bias) or bias == -math.inf):
            expected = f"a finite number or -inf{too_large(bias)}"
            raise ValueError(f"logit_bias[{shown(token)}]={shown(bias)}: expected {expected}")
        biases[check_integer("logit_bias", token, "token ids >= 0 as keys", 0)] = float(bias)
    return biases
