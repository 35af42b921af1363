"""The interface of every method (Params, Response), and `Rows`, through which all methods run their models.

A method is a function `(..., prompts, params) -> list[Response]`. Its first arguments are its models; prompts are
token ids. Row i draws with a generator seeded by `params.seed + i`. So a response does not depend on the rest of its
batch, except for rounding: matrix products of another shape round differently. `Response.forwards` counts the forward
passes of each model for that response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from genarm_fast.engine.scheduler import common_prefix
from genarm_fast.text.prompts import left_padded


@dataclass(frozen=True)
class Params:
    """Sampling parameters. Temperature 0 takes the likeliest token. A stop token ends a response as its last token."""

    max_new_tokens: int = 48
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: expected at least 0")


@dataclass
class Response:
    """A response's token ids, and its forward passes by model: one for the prompt, one for each position after it."""

    tokens: list[int] = field(default_factory=list)
    forwards: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Member:
    """A model and its name. `read` maps the model's output at R rows and q positions to values [R, q, ...]."""

    name: str
    model: Any
    read: Callable[[Any], Tensor] = lambda output: output.logits.float()

    def start(self, prompts: Sequence[Sequence[int]]) -> Rows:
        return Rows(self, prompts)


def reward_member(name: str, model: Any) -> Member:
    """Return a Member whose `read` gives a `TrajectoryReward`'s reward of each prefix, [R, q]."""
    return Member(name, model.decoder, lambda output: model.head(output.last_hidden_state).squeeze(-1).float())


class Rows:
    """A batch of texts that one model reads, with their KV cache.

    The tokens that all prompts begin with, for example the template's opening, are read once. last [R, ...]: the value
    of `read` at each row's last token. forwards [R]: forward passes of each row so far.
    """

    @torch.inference_mode()
    def __init__(self, member: Member, prompts: Sequence[Sequence[int]]) -> None:
        rows = [list(prompt) for prompt in prompts]
        # Length of the shared opening. Each row keeps at least one token after it, whose output becomes `last`.
        opening = min(common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)
        self.member, self.cache = member, DynamicCache(config=member.model.config)
        self.forwards = torch.zeros(1, dtype=torch.int64)
        if opening > 0:
            self.mask = torch.ones(1, opening, dtype=torch.int64)
            self._run(torch.tensor([rows[0][:opening]]), torch.arange(opening)[None], prefill=True)
            self.cache.batch_repeat_interleave(len(rows))
        tokens, mask = left_padded([row[opening:] for row in rows], 0)  # padding is between the opening and the rest
        self.mask = torch.cat([mask.new_ones(len(rows), opening), mask], 1)
        self.forwards = torch.zeros(len(rows), dtype=torch.int64)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, opening:]
        self.last = self._run(tokens, positions, prefill=True)[:, -1]

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Append tokens [R, q] to the rows and return the value of `read` at each, [R, q, ...]."""
        start = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        found = self._run(tokens, start + torch.arange(tokens.shape[1]))
        self.last = found[:, -1]
        return found

    @torch.inference_mode()
    def siblings(self, tokens: Tensor) -> Tensor:
        """Return the value of `read` for each of tokens [R, k] as the next one, [R, k, ...]. The rows do not change.

        One forward reads k tokens per row. Each attends to the text and to itself, so no cache is copied."""
        rows, k = tokens.shape
        seen = torch.cat([self.mask[:, None].expand(-1, k, -1), torch.eye(k).expand(rows, -1, -1)], 2).bool()
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        output = self.member.model(
            input_ids=tokens,
            attention_mask=hidden[:, None],
            position_ids=self.mask.sum(-1, keepdim=True).expand(-1, k),
            past_key_values=self.cache,
        )
        self.cache.crop(-k)
        self.forwards += k
        return self.member.read(output)

    def _run(self, tokens: Tensor, positions: Tensor, *, prefill: bool = False) -> Tensor:
        self.forwards += 1
        # Only the logits of a prompt's last token are used. A reward model has no lm_head, and no such option.
        kept = {"logits_to_keep": 1} if prefill and hasattr(self.member.model, "lm_head") else {}
        output = self.member.model(
            input_ids=tokens, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, **kept
        )
        return self.member.read(output)

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times; the copies of a row are neighbours."""
        self.cache.batch_repeat_interleave(times)
        self.mask, self.last, self.forwards = (
            each.repeat_interleave(times, 0) for each in (self.mask, self.last, self.forwards)
        )

    def select(self, index: Tensor) -> None:
        """Keep only the rows of `index`, in its order."""
        self.cache.batch_select_indices(index)
        self.mask, self.last, self.forwards = (each[index] for each in (self.mask, self.last, self.forwards))

    def forget(self, tokens: int) -> None:
        """Remove the last `tokens` tokens of every row. The caller must then set `last`."""
        if tokens:
            self.cache.crop(-tokens)
            self.mask = self.mask[:, :-tokens]


def generators(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw(scores: Tensor, temperature: float, noise: Sequence[torch.Generator]) -> Tensor:
    """Return indices [R] drawn from softmax(scores [R, n] / temperature); at temperature 0 the first largest."""
    if temperature == 0:
        return scores.argmax(-1)
    bounds = (scores.double() / temperature).softmax(-1).cumsum(-1)
    uniforms = torch.stack([torch.rand(1, generator=each, dtype=torch.float64) for each in noise])
    return torch.searchsorted(bounds, uniforms * bounds[:, -1:], right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)
