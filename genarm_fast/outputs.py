"""What a request gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from genarm_fast.utils.jsonlines import finite


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of a generated token under the guided distribution, and the most probable tokens there."""

    logprob: float
    top: dict[int, float]  # token id -> log-probability, most probable first


@dataclass(slots=True)
class ArmRewards:
    """An ARM's rewards: `tokens[t]` = log π_arm(token t | its prefix), natural log (arXiv 2410.08193, eq. 5)."""

    tokens: list[float]

    @property
    def total(self) -> float:
        """The response's reward, the sum over its tokens."""
        return math.fsum(self.tokens)


@dataclass(slots=True)
class Completion:
    """One sampled continuation.

    text: decoded, without the stop string that ended it. token_ids: all generated ids, stop token included.
    finish_reason: "stop" (see stop_reason), "length", "time" (max_time is over), or "cancelled" (closed early).
    stop_reason: the stop string, the stop or end-of-sequence token id, or None.
    seed: what reproduces it. weights: the ARM weights that each token was drawn with.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    seed: int
    weights: list[tuple[float, ...]]
    logprobs: list[TokenLogprob] | None = None
    rewards: dict[str, ArmRewards] | None = None


@dataclass(slots=True)
class Usage:
    """Token counts: the base's prompt, and all completions together."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Timing:
    """Wall-clock seconds. A batch shares its clock: requests decoded together report the same prefill time.

    prefill: prompt forwards of all members. decode: from their end to this request's last token.
    """

    prefill: float
    decode: float
    tokens_per_second: float  # this request's tokens over `decode`


@dataclass(slots=True)
class Rounds:
    """What speculation did for a request: turns of the decode loop, tokens that were proposed, and those of them kept.

    Each turn settles one token more than it keeps drafts, so plain decoding takes as many turns as tokens.
    """

    rounds: int
    drafted: int
    accepted: int


@dataclass(slots=True)
class GenerationOutput:
    """All completions of one prompt; the properties read the first one."""

    prompt: str | list[dict[str, str]] | list[int]
    prompt_token_ids: list[int]  # as the base sees it
    completions: list[Completion]
    usage: Usage
    timing: Timing
    rounds: Rounds

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.completions[0].finish_reason

    @property
    def seed(self) -> int:
        return self.completions[0].seed

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.completions[0].logprobs

    @property
    def rewards(self) -> dict[str, ArmRewards] | None:
        return self.completions[0].rewards

    def to_dict(self, token_text: Callable[[int], str] | None = None) -> dict[str, Any]:
        """Plain types for JSON, with each reward's total. A log-probability of -inf is None.

        token_text: the text of a token id, by which log-probabilities get `token`, the text of the token itself, and
        `top_tokens`, those of the most probable ones by id.
        """
        data = asdict(self)
        for plain, completion in zip(data["completions"], self.completions):
            plain["rewards"] = rewards_to_dict(completion.rewards)
            plain["logprobs"] = finite(plain["logprobs"])
            if token_text is not None:
                for entry, token in zip(plain["logprobs"] or (), completion.token_ids):
                    entry["token"] = token_text(token)
                    entry["top_tokens"] = {each: token_text(each) for each in entry["top"]}
        return data


@dataclass(slots=True)
class ScoreOutput:
    """The members' log-probabilities of a given response, end-of-sequence included if it was scored."""

    prompt: str | list[dict[str, str]] | list[int]
    response: str | list[int]
    token_ids: list[int]
    base_logprobs: list[float]
    rewards: dict[str, ArmRewards]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, with each reward's total. A log-probability of -inf is None."""
        return {**asdict(self), "base_logprobs": finite(self.base_logprobs), "rewards": rewards_to_dict(self.rewards)}


def rewards_to_dict(rewards: dict[str, ArmRewards] | None) -> dict[str, dict[str, float | Sequence[float]]] | None:
    """Rewards with their totals, for JSON."""
    if rewards is None:
        return None
    return finite({name: {"total": reward.total, "tokens": reward.tokens} for name, reward in rewards.items()})
