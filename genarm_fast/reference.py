"""The naive guided decoder: the specification that every fast path is tested against.

    p(x | prefix) ∝ exp((log π_base(x | prefix) + Σ_i w_i · log π_arm_i(x | prefix)) / T)       arXiv 2410.08193, eq. 6

It decodes one request, one token at a time. Every model reads the whole prefix for each token, without a cache, and
scores are float64. Noise follows the contract of `genarm_fast.kernels.philox`, so that the tokens of fast decoders can
be compared with those of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genarm_fast.kernels.guided_sample.reference import TILE
from genarm_fast.kernels.philox import TILE_LEVEL, TOKEN_LEVEL, gumbel, seed_tensor


def guided_probs(
    base_logits: Tensor,
    arm_logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Return the guided next-token distribution.

    Args:
        base_logits: [..., V], any float dtype. arm_logits: for each ARM a tensor of the same shape.
        weights: m numbers of any sign. temperature: T ≥ 0; 0 puts all mass on the most probable token, and of several
            on the lowest id.
        top_k: 0 keeps all. top_p: in (0, 1]. min_p: in [0, 1]. The filters apply in this order, after T; a filter
            keeps all tokens whose probability equals its threshold.

    Returns:
        Probabilities, float64 [..., V]. A token masked (-inf) by the base or by an ARM of non-zero weight gets 0.

    Raises:
        ValueError: the wrong number of weights, unequal shapes, NaN or +inf logits, or a row without any token left.
    """
    return truncated_probs(guided_scores(base_logits, arm_logits, weights), temperature, top_k, top_p, min_p)


def guided_scores(
    base_logits: Tensor, arm_logits: Sequence[Tensor], weights: Sequence[float] | Tensor, base_weight: float = 1.0
) -> Tensor:
    """Return log p at T = 1, float64 [..., V]: the weighted sum of the members' log-probabilities, normalised.

    A token that the base masks (-inf) stays impossible at any weight of the base, 0 included.
    """
    if len(weights) != len(arm_logits):
        raise ValueError(f"weights={weights}: expected one per ARM, {len(arm_logits)} in all, got {len(weights)}")
    total = torch.zeros_like(base_logits, dtype=torch.float64)
    masked = torch.zeros_like(base_logits, dtype=torch.bool)
    for i, (logits, weight) in enumerate(zip((base_logits, *arm_logits), (base_weight, *weights))):
        name = "base_logits" if i == 0 else f"arm_logits[{i - 1}]"
        if logits.shape != base_logits.shape:
            raise ValueError(f"{name} of shape {tuple(logits.shape)}: expected {tuple(base_logits.shape)}")
        if bool((logits.isnan() | (logits == torch.inf)).any()):
            raise ValueError(f"{name}: expected finite numbers or -inf, got NaN or +inf")
        if weight == 0 and i:
            continue
        logprobs = logits.to(torch.float64).log_softmax(-1)
        hole = logits == -torch.inf
        masked |= hole
        total += weight * logprobs.masked_fill(hole, 0.0)
    if bool(masked.all(-1).any()):
        raise ValueError("base_logits, arm_logits: expected at least one token that no member masks with -inf")
    return total.masked_fill(masked, -torch.inf).log_softmax(-1)


def truncated_probs(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return the probabilities, float64 [..., V], after temperature, top-k, top-p and min-p, in this order.

    scores: log-probabilities [..., V].
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(torch.float64)
    probs = (scores.to(torch.float64) / temperature).softmax(-1)
    if 0 < top_k < probs.shape[-1]:
        probs = probs * (probs >= probs.topk(top_k, -1).values[..., -1:])
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        ordered = probs.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # probability of all tokens that precede each one in this order
        last = (before < top_p).sum(-1, keepdim=True) - 1
        probs = probs * (probs >= ordered.gather(-1, last))
    probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, seed: int, position: int) -> int:
    """Return the token id that the random-number contract draws for this seed at this position of the response.

    probs: probabilities [V].
    """
    seeds, positions = seed_tensor([seed]), torch.tensor([position])
    tiles = probs.log().split(TILE)
    tile_noise = gumbel(seeds, TILE_LEVEL, positions, torch.arange(len(tiles)))
    tile = int((torch.stack([scores.logsumexp(0) for scores in tiles]) + tile_noise).argmax())
    tokens = tile * TILE + torch.arange(len(tiles[tile]))
    return int(tokens[(tiles[tile] + gumbel(seeds, TOKEN_LEVEL, positions, tokens)).argmax()])


@dataclass
class ReferenceOutput:
    """Output of the naive decoder for one request.

    tokens: generated ids, a stop id included. logprobs: each token's log-probability under p before truncation (T = 1
    when greedy). member_logprobs: for each token its log-probability under the base and under every ARM, its rewards.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    member_logprobs: list[list[float]] = field(default_factory=list)


def _weight_at(weight: float | Sequence[float], position: int) -> float:
    return weight[min(position, len(weight) - 1)] if isinstance(weight, Sequence) else weight


@torch.no_grad()
def generate(
    base: Callable[..., Any],
    arms: Sequence[Callable[..., Any]],
    prompts: Sequence[Sequence[int]],
    weights: Sequence[float | Sequence[float]] | Callable[[int], Sequence[float]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    base_weight: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_new_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    allowed_token_ids: Sequence[int] | None = None,
    suppress_tokens: Sequence[int] = (),
    logits_processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    vocab_size: int | None = None,
) -> ReferenceOutput:
    """Generate the tokens of one request.

    Args:
        base, arms: callables `(input_ids [1, t]) -> object with .logits [1, t, V]`, such as models of transformers.
        prompts: token ids of the prompt for the base and for each ARM (templates may differ).
        weights: one weight for each of m ARMs, or a function from the index of the next token to m numbers. A weight
            is a number, or a list with a number for each token; the last number of a list repeats.
        vocab_size: size of the common vocabulary; default: that of the member with the fewest logits.

    Other arguments mean what they mean in `genarm_fast.SamplingParams`.
    """
    members = (base, *arms)
    output = ReferenceOutput()
    for position in range(max_new_tokens):
        logits = [
            member(torch.tensor([[*prompt, *output.tokens]])).logits[0, -1].to(torch.float64)
            for member, prompt in zip(members, prompts, strict=True)
        ]
        width = vocab_size or min(len(row) for row in logits)
        logits = [row[:width] for row in logits]
        now = weights(position) if callable(weights) else [_weight_at(weight, position) for weight in weights]
        scores = guided_scores(logits[0], logits[1:], now, base_weight)

        seen = [*prompts[0], *output.tokens]
        penalised = sorted({token for token in seen if token < width})
        scores[penalised] *= repetition_penalty  # log-probabilities are never positive
        for token in set(output.tokens):
            scores[token] -= frequency_penalty * output.tokens.count(token) + presence_penalty
        for token, bias in (logit_bias or {}).items():
            scores[token] += bias
        ruled_out = set() if allowed_token_ids is None else set(range(width)) - set(allowed_token_ids)
        scores[sorted(ruled_out | set(suppress_tokens))] = -torch.inf
        if position < min_new_tokens:
            scores[list(stop_token_ids)] = -torch.inf
        for processor in logits_processors:
            scores = processor(torch.tensor([seen]), scores[None].to(torch.float32))[0].to(torch.float64)

        token = draw(truncated_probs(scores, temperature, top_k, top_p, min_p), seed, position)
        output.tokens.append(token)
        output.logprobs.append(float((scores / (temperature or 1.0)).log_softmax(-1)[token]))
        output.member_logprobs.append([float(row.log_softmax(-1)[token]) for row in logits])
        if token in stop_token_ids:
            break
    return output
