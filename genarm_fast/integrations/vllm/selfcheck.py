"""A check at start: what the guided model computes from its members, against the formula in float64.

vLLM's internals change with each minor version, and a change may alter numbers without an error. The check runs each
member's own head on random hidden states, and the lanes' linears on random inputs. It takes a few milliseconds and no
forward, so nothing is compiled or captured for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genarm_fast.integrations.vllm.lanes import LaneMethod

TEST_ROWS = 3
MAX_CHECKED_LINEARS = 8  # most linears of the lanes that are checked: those of the first layers


@torch.inference_mode()
def check_model(model: Any) -> None:
    """Raises RuntimeError if the guided logits, or a lane's linear, differ from the formula.

    All ranks of a tensor-parallel group call this together.
    """
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.base.parameters())
    dtype = model.config.dtype if isinstance(getattr(model.config, "dtype", None), torch.dtype) else parameter.dtype
    dtype = dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.bfloat16

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(parameter.device)

    weights = torch.cat([random(TEST_ROWS, 1).fill_(1.0), random(TEST_ROWS, model.arms)], dim=-1)
    weights[-1, 1:] = 0.0
    hidden = [random(TEST_ROWS, size).to(dtype) for size in model.sizes[: -len(model.parts(weights, dtype))]]
    found = model.compute_logits(torch.cat([*hidden, *model.parts(weights, dtype)], dim=-1))
    own = [head.compute_logits(each) for head, each in zip(model.heads(), hidden)]
    if found is not None:
        _check_logits(found, own, weights[:, 1:][:, model.order], model.vocab_size)
    linears = [m for m in model.base.modules() if isinstance(getattr(m, "quant_method", None), LaneMethod)]
    for linear in linears[:MAX_CHECKED_LINEARS]:
        _check_lanes(linear, random)


def _check_logits(found: Tensor, own: list[Tensor], weights: Tensor, size: int) -> None:
    base, *arms = (each[:, :size].double() for each in own)
    expected = base.log_softmax(-1)
    for i, arm in enumerate(arms):
        expected = expected + weights[:, i, None].double() * arm.log_softmax(-1)
    expected = expected.log_softmax(-1)
    off = float((found[:, :size].double().log_softmax(-1) - expected).abs().max())
    spread = float(max(each.abs().max() for each in (base, *arms))) * (1 + float(weights.abs().sum(-1).max()))
    outside = found[:, size:]
    if not off <= 1e-5 * max(spread, 1.0) or bool((outside != -torch.inf).any()):
        raise RuntimeError(
            f"self-check: guided log-probabilities are off by {off:.2g} from those of the members' own logits, or"
            f" tokens behind {size} are possible; this vLLM is not one that genarm_fast can guide"
        )


def _check_lanes(linear: nn.Module, random: Any) -> None:
    method: Any = linear.quant_method
    deltas = [None, *method.deltas]
    sample = next(delta for delta in deltas if delta is not None)[0]
    inputs = sample.shape[1]
    x = random(TEST_ROWS * len(deltas), inputs).to(sample.dtype)
    expected = method.inner.apply(linear, x.clone(), None).double()
    for lane, delta in enumerate(deltas):
        if delta is not None:
            rows, (a, b) = slice(lane * TEST_ROWS, (lane + 1) * TEST_ROWS), delta
            expected[rows] += (x[rows].double() @ a.double().t()) @ b.double().t()
    found = method.apply(linear, x, None).double()
    off = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    if not off <= 4 * torch.finfo(x.dtype).eps * inputs**0.5:
        raise RuntimeError(
            f"self-check: a LoRA lane is off by {off:.2g} of its largest number; this vLLM is not one that genarm_fast"
            " can guide"
        )
