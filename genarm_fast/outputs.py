"""Outputs of requests: completions, log-probabilities, rewards, usage and timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from genarm_fast.utils.jsonlines import finite


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of a generated token under the guided distribution, and the most probable tokens beside it."""

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

    text: the decoded tokens, by default without the stop string that ended it. token_ids: all generated ids, stop
    token included. finish_reason: "stop" (see stop_reason), "length", "time" (max_time is over), or "cancelled" (closed
    early). stop_reason: the stop string, the stop or end-of-sequence token id, or None. seed: the seed that reproduces
    the completion. weights: the ARM weights that each token was drawn with.
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
    """Token counts of a request: its prompt as the base sees it, and all of its completions together."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Timing:
    """Wall-clock seconds of a request.

    prefill: from the request's first slot to the end of its prefill by all members. Other requests of the batch may
    run meanwhile. decode: from the end of the prefill to the request's last token.
    """

    prefill: float
    decode: float
    tokens_per_second: float  # tokens of all completions, divided by `decode`


@dataclass(slots=True)
class Rounds:
    """Effect of speculation on a request: steps of its sequences, drafts that were proposed, and drafts accepted.

    A step gives a sequence its accepted drafts and one token more. So plain decoding takes as many steps as tokens.
    """

    rounds: int
    drafted: int
    accepted: int


@dataclass(slots=True)
class GenerationOutput:
    """Output of one request: all completions of its prompt. The properties read the first completion."""

    prompt: str | list[dict[str, str]] | list[int]
    prompt_token_ids: list[int]  # the base's token ids of the prompt
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
        """Return the output in plain types for JSON, with each reward's total. A log-probability of -inf becomes None.

        token_text: returns the text of a token id. With it, each entry of `logprobs` also has the text of the drawn
        token, `token`, and the texts of the most probable tokens by id, `top_tokens`.
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
    """Log-probabilities of a given response by the base and the ARMs, end-of-sequence included if it was scored."""

    prompt: str | list[dict[str, str]] | list[int]
    response: str | list[int]
    token_ids: list[int]
    base_logprobs: list[float]
    rewards: dict[str, ArmRewards]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores in plain types for JSON, with each reward's total. A value of -inf becomes None."""
        return {**asdict(self), "base_logprobs": finite(self.base_logprobs), "rewards": rewards_to_dict(self.rewards)}


def rewards_to_dict(rewards: dict[str, ArmRewards] | None) -> dict[str, dict[str, float | Sequence[float]]] | None:
    """Return each ARM's rewards with their total, for JSON. A value of -inf becomes None."""
    if rewards is None:
        return None
    return finite({name: {"total": reward.total, "tokens": reward.tokens} for name, reward in rewards.items()})
