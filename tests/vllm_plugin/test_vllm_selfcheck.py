"""The check at start passes a right model and stops a wrong one. No engine is started here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genarm_fast.integrations.vllm.composite import WEIGHT_PARTS, GenARMForCausalLM
from genarm_fast.integrations.vllm.lanes import Delta, LaneMethod, packed_delta
from genarm_fast.integrations.vllm.selfcheck import check_model


class Plain:
    """A stand-in for a linear's own method."""

    def apply(self, layer, x, bias=None):
        return x @ layer.weight.t()


class Head(nn.Module):
    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, hidden), requires_grad=False)

    def compute_logits(self, hidden):
        return hidden @ self.weight.t()


def made(order=(1, 0)) -> GenARMForCausalLM:
    """Return a base of 40 tokens with a lane, and an ARM of 36 tokens that comes first among the ARMs."""
    torch.manual_seed(0)
    model = GenARMForCausalLM.__new__(GenARMForCausalLM)
    nn.Module.__init__(model)
    model.base, model.arm0 = Head(40), Head(36, 8)
    model.config = SimpleNamespace()
    model.lanes, model.arms, model.names, model.order = 2, 2, ["base", "arm0"], list(order)
    model.sizes, model.vocab_size = [16, 16, 8, *[3] * WEIGHT_PARTS], 30
    model.returns_members = model.rewards = False
    deltas = [Delta(1, 4, torch.randn(2, 16), torch.randn(6, 2)), Delta(1, 20, torch.randn(3, 16), torch.randn(4, 3))]
    model.base.quant_method = LaneMethod(Plain(), [packed_delta(deltas, 40)])
    return model


def test_a_right_model_passes():
    check_model(made())


def narrow_weights(model):
    model.parts = lambda weights, dtype: [weights.to(torch.bfloat16).float(), *[torch.zeros_like(weights)] * 2]


def exchanged(model):
    right = model.compute_logits
    model.compute_logits = lambda hidden: right(torch.cat([hidden[:, 16:32], hidden[:, :16], hidden[:, 32:]], -1))


def unmasked(model):
    right = model.compute_logits
    model.compute_logits = lambda hidden: right(hidden).clamp_min(-1e4)


def dead_lane(model):
    right = model.base.quant_method
    model.base.quant_method = LaneMethod(Plain(), [])
    model.base.quant_method.deltas = right.deltas
    model.base.quant_method.apply = Plain().apply


def test_parts_of_a_packed_linear_are_added_where_they_belong():
    torch.manual_seed(1)
    deltas = [Delta(1, 0, torch.randn(2, 16), torch.randn(6, 2)), Delta(1, 10, torch.randn(3, 16), torch.randn(4, 3))]
    linear = Head(14)
    x = torch.randn(6, 16)
    found = LaneMethod(Plain(), [None, packed_delta(deltas, 14)]).apply(linear, x)
    expected = Plain().apply(linear, x)
    assert torch.equal(found[:4], expected[:4])  # rows of the bare base, and of a lane without a LoRA on this linear
    for _, start, a, b in deltas:
        expected[4:, start : start + len(b)] += (x[4:] @ a.t()) @ b.t()
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[4:], Plain().apply(linear, x)[4:])


@pytest.mark.parametrize("fault", [narrow_weights, exchanged, unmasked, dead_lane])
def test_a_wrong_one_does_not(fault):
    model = made()
    fault(model)
    with pytest.raises(RuntimeError, match="self-check"):
        check_model(model)
