"""Log-likelihoods of responses, Σ log π, and the ranking of held-out pairs by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from baselines.interface import Member
from baselines.pairs import render
from genarm_fast.train.data import Pair


def log_likelihoods(
    model: Member, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], batch: int = 16
) -> Iterator[float]:
    """Yield Σ log π of each response, in nats. The tokens that all prompts of a batch begin with are read once."""
    for i in range(0, len(prompts), batch):
        state, rows = model.start(prompts[i : i + batch]), responses[i : i + batch]
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        logits = torch.cat([state.last[:, None], *([state.advance(tokens[:, :-1])] if width > 1 else [])], 1)
        found = logits.log_softmax(-1).gather(-1, tokens[:, :, None]).squeeze(-1)
        yield from (float(each[: len(row)].sum()) for each, row in zip(found, rows))


def encoded(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], complete: bool = True
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of prompts and of responses: two rows per pair, the chosen response first.

    complete: strip the responses and end them with EOS.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = [ids(render(tokenizer, pair.prompt)) for pair in pairs for _ in range(2)]
    texts = [str(side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    responses = [ids(text.strip() if complete else text) for text in texts]
    return prompts, [[*row, tokenizer.eos_token_id] for row in responses] if complete else responses


def share_right(margins: Tensor) -> dict[str, float]:
    """Return the share of positive margins [n], its standard error, and the mean margin in nats. A zero counts half."""
    right = ((margins > 0).double() + (margins == 0).double() / 2).mean().item()
    error = (right * (1 - right) / len(margins)) ** 0.5
    return {"accuracy": right, "standard_error": error, "mean_margin": margins.mean().item()}


def rankings(policy: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Return how often the chosen response of held-out pairs ranks first, by each of four scores.

    The first score is the PEFT policy's Σ log π, by which ARMs are measured. The second is Σ log (π / π_base), the
    reward that DPO trains. The others are the base's Σ log π, and length, where the shorter response ranks first.
    """
    prompts, responses = encoded(tokenizer, pairs)

    def margins(values: Iterator[float] | list[float]) -> Tensor:
        sides = torch.tensor(list(values), dtype=torch.float64).view(-1, 2)
        return sides[:, 0] - sides[:, 1]

    of_policy = margins(log_likelihoods(Member("policy", policy), prompts, responses))
    with policy.disable_adapter():
        of_base = margins(log_likelihoods(Member("base", policy), prompts, responses))
    shorter = margins([-float(len(row)) for row in responses])
    return {
        "policy": share_right(of_policy),
        "policy over base": share_right(of_policy - of_base),
        "base": share_right(of_base),
        "shorter": share_right(shorter),
    }
