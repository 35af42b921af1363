"""Log-probabilities of labelled tokens, from hidden states.

Hidden states h, output weight W, bias b, logit scale s and softcap c give u = s · (h Wᵀ + b) and z = c · tanh(u / c).
Without a softcap z = u. With the labels y,

    logp_t = z_t[y_t] − log Σ_v exp z_t[v]            and            R = Σ_t logp_t

R is the reward that an autoregressive reward model gives a response (arXiv 2410.08193).
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # label of positions that do not count


def arm_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_tokens: bool = False,
) -> Tensor:
    """The specification of `arm_logps`, with the same arguments: full logits and plain autograd."""
    logits = (hidden @ weight.to(hidden.dtype).T).to(accumulator(hidden.dtype))
    logits = (logits if bias is None else logits + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    picked = labels.clamp(min=0).unsqueeze(-1)
    logps = torch.log_softmax(logits, -1).gather(-1, picked).squeeze(-1).where(labels != IGNORE, 0.0)
    return logps if return_tokens else logps.sum(-1)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
