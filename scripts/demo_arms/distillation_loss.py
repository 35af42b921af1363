"""The loss of distillation, over the few next tokens of each position that teacher_data.py kept.

-Σ_x p(x) log q(x) is KL(p || q) plus the base's entropy: exact on the base's 48 likeliest tokens, and an unbiased
estimate on the tail, of which 8 draws stand for the remaining mass. (One bucket for the tail says nothing about which
tokens are in it, renormalising the top pretends that there is none; the tail holds a tenth of this base's mass.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import load_responses
from torch import Tensor, nn
from transformers import LlamaForCausalLM

NEGATIVES = 2048


class SparseCrossEntropy(torch.autograd.Function):
    """Mean over rows of -Σ_k probs[n, k] · log softmax(hidden @ weight.T + bias)[n, ids[n, k]], never holding [N, V].

    hidden [N, D], weight [V, D], bias [V] float32; ids [N, K] int64, a row may repeat one; probs [N, K], rows sum to 1.
    The gradients (none for bias) are made in the forward pass, so that each chunk's logits are computed once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, probs: Tensor, chunk: int = 128
    ) -> Tensor:
        d_hidden, loss = torch.empty_like(hidden), hidden.new_zeros(())
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), chunk):
            h, k, p = hidden[i : i + chunk], ids[i : i + chunk], probs[i : i + chunk]
            logits = torch.addmm(bias, h, weight.T)
            log_z = logits.logsumexp(-1, keepdim=True)
            loss += log_z.sum() - (logits.gather(1, k) * p).sum()
            grad = logits.sub_(log_z).exp_().scatter_add_(1, k, -p)
            d_hidden[i : i + chunk] = grad @ weight
            if d_weight is not None:
                d_weight.addmm_(grad.T, h)
        ctx.save_for_backward(d_hidden.div_(len(hidden)), None if d_weight is None else d_weight.div_(len(hidden)))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return grad * d_hidden, None if d_weight is None else grad * d_weight, None, None, None, None


def candidates(ids: Tensor, vocab_size: int, negatives: int) -> tuple[Tensor, Tensor]:
    """Token ids that a batch's normalisers are summed over, ascending, and the log of how many tokens each stands for.

    All of `ids`, and `negatives` draws from the others: the normaliser is estimated without bias, at a quarter of the
    cost. All tokens where there are no more.
    """
    named = torch.zeros(vocab_size, dtype=torch.bool)
    named[ids] = True
    others = (~named).nonzero()[:, 0]
    if len(others) <= negatives:
        return torch.arange(vocab_size), torch.zeros(vocab_size)
    drawn = others[torch.randperm(len(others))[:negatives]]
    log_count = torch.zeros(vocab_size)
    log_count[drawn] = math.log(len(others) / negatives)
    named[drawn] = True
    kept = named.nonzero()[:, 0]
    return kept, log_count[kept]


def sparse_targets(response: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """ids [N, 48 + 8] and their probabilities: the top as stored, the tail's draws an eighth of what is left each."""
    top = torch.from_numpy(response["top_logprobs"]).float().exp()
    top /= top.sum(-1, keepdim=True).clamp_min(1.0)  # float16 may round the sum above 1
    tail_ids = response["tail_ids"]
    tail = ((1 - top.sum(-1, keepdim=True)) / tail_ids.shape[1]).expand(-1, tail_ids.shape[1])
    ids = np.concatenate([response["top_ids"], tail_ids], -1).astype(np.int64)
    return torch.from_numpy(ids), torch.cat([top, tail], -1)


def batch_loss(
    student: LlamaForCausalLM, responses: list[dict[str, np.ndarray]], free: int | None = None
) -> tuple[Tensor, int]:
    """The loss over all response positions of a batch, and how many they are.

    With `free`, given that this is not the next token: it may have any probability.
    """
    lengths = [(len(r["prompt_tokens"]), len(r["tokens"])) for r in responses]
    ids = torch.zeros(len(responses), max(p + n for p, n in lengths) - 1, dtype=torch.long)
    for row, r in zip(ids, responses):
        text = np.concatenate([r["prompt_tokens"], r["tokens"][:-1]]).astype(np.int64)
        row[: len(text)] = torch.from_numpy(text)
    states = student.model(input_ids=ids, use_cache=False).last_hidden_state  # causal: right padding needs no mask
    hidden = torch.cat([row[p - 1 : p - 1 + n] for row, (p, n) in zip(states, lengths)])
    targets, probs = (torch.cat(column) for column in zip(*map(sparse_targets, responses)))
    if free is not None:
        probs = probs.masked_fill(targets == free, 0.0)
        some = probs.sum(-1) > 0.01
        hidden, targets, probs = hidden[some], targets[some], probs[some] / probs[some].sum(-1, keepdim=True)
    kept, bias = candidates(targets, student.config.vocab_size, NEGATIVES)
    if free is not None:
        bias[kept == free] = -1e4  # of no weight, and finite
    weight = student.get_output_embeddings().weight.index_select(0, kept)
    return SparseCrossEntropy.apply(hidden, weight, bias, torch.searchsorted(kept, targets), probs), len(hidden)


class Distillation:
    """An `auxiliary_loss` for `train`: keeps an ARM near the base, by `count` of its answers for each micro-batch.

    It may say what it likes of the token `free`.
    """

    def __init__(self, shards: Path, count: int, weight: float = 1.0, free: int | None = None) -> None:
        self.responses, self.count, self.weight, self.free = load_responses(shards), count, weight, free

    def __call__(self, lm: nn.Module, number: int) -> Tensor:
        causal = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        drawn = np.random.default_rng(number).choice(len(self.responses), self.count, replace=False)
        return self.weight * batch_loss(causal, [self.responses[i] for i in drawn], self.free)[0]
