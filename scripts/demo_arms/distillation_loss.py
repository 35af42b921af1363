"""The loss of distillation, over the few next tokens that teacher_data.py kept at each position.

-Σ_x p(x) log q(x) is KL(p || q) plus the base's entropy. It is exact on the base's 48 likeliest tokens. On the tail it
is an unbiased estimate, where 8 draws stand for the remaining mass, a tenth of this base's. One bucket for the tail
would not say which tokens are in it; renormalising the top tokens would pretend that there is no tail.
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

    hidden [N, D], weight [V, D] and bias [V] are float32. ids [N, K] is int64, and a row may repeat an id. The rows of
    probs [N, K] sum to 1. The forward pass also makes the gradients, so that each chunk's logits are computed once.
    bias gets no gradient.
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
    """Return the ascending token ids over which a batch sums its normalisers, and the log of each id's count of tokens.

    They are all of `ids`, and `negatives` draws from the other tokens. A drawn id stands for several tokens, so the
    normaliser is estimated without bias, at a quarter of the cost. With at most `negatives` others, all are returned.
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
    """Return ids [N, 48 + 8] and their probabilities: those stored for the top, an eighth of the rest for each draw."""
    top = torch.from_numpy(response["top_logprobs"]).float().exp()
    top /= top.sum(-1, keepdim=True).clamp_min(1.0)  # float16 may round the sum above 1
    tail_ids = response["tail_ids"]
    tail = ((1 - top.sum(-1, keepdim=True)) / tail_ids.shape[1]).expand(-1, tail_ids.shape[1])
    ids = np.concatenate([response["top_ids"], tail_ids], -1).astype(np.int64)
    return torch.from_numpy(ids), torch.cat([top, tail], -1)


def batch_loss(
    student: LlamaForCausalLM, responses: list[dict[str, np.ndarray]], free: int | None = None
) -> tuple[Tensor, int]:
    """Return the loss over all response positions of a batch, and the number of these positions.

    free: a token that may have any probability; both distributions are conditioned on the next token being another.
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
        bias[kept == free] = -1e4  # no weight in the softmax, but finite
    weight = student.get_output_embeddings().weight.index_select(0, kept)
    return SparseCrossEntropy.apply(hidden, weight, bias, torch.searchsorted(kept, targets), probs), len(hidden)


class Distillation:
    """An `auxiliary_loss` for `train` that keeps an ARM near the base.

    It uses `count` of the base's answers per micro-batch. The ARM may give the token `free` any probability.
    """

    def __init__(self, shards: Path, count: int, weight: float = 1.0, free: int | None = None) -> None:
        self.responses, self.count, self.weight, self.free = load_responses(shards), count, weight, free

    def __call__(self, lm: nn.Module, number: int) -> Tensor:
        causal = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        drawn = np.random.default_rng(number).choice(len(self.responses), self.count, replace=False)
        return self.weight * batch_loss(causal, [self.responses[i] for i in drawn], self.free)[0]
