"""Decide whether a decoder on a GPU runs as a `StackedDecoder`, by a trial against its own forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from genarm_fast.device.base import out_of_memory
from genarm_fast.models.known_decoders import WINDOWS, built_as_known, trial
from genarm_fast.models.stacked_decoder import StackedDecoder, bare_linear, stack_of
from genarm_fast.models.weights import Movable

ROUNDING_UNIT = {
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
    torch.float32: 2**-18,
}  # unit by which a product of 4,096 numbers is rounded
# The same unit for torch's settings of float32 products.
PRODUCT_ROUNDING_UNIT = {"highest": 0.0, "high": 2**-11, "medium": 2**-8}
ROUNDINGS = 8  # how often a number is rounded on its way through a layer
BLOCKS = (4, 1)  # tokens of each forward of the trial


def stacked_forward(decoder: Any, movable: Movable) -> tuple[StackedDecoder | None, str]:
    """Return a forward that may replace the decoder's own, or None; and a text that says which one runs and why.

    The decoder's linears, and all parameters in `movable` over the same weights, become views of stacked weights. If
    the weights are stacked for another model already, the decoder shares that stack. No number is held twice, and none
    changes.
    """
    if reason := _unfit(decoder):
        return None, f"its own forward: {reason}"
    forward = StackedDecoder(decoder, movable)
    bound = tolerance(decoder)
    try:
        chosen = forward.choose_kernels()  # before the trial, which then checks these kernels too
        distance = deviation(decoder, forward)
    except Exception as error:
        if out_of_memory(error):
            raise
        return None, f"its own forward: the stacked one failed in its trial: {type(error).__name__}: {error}"
    if not distance <= bound:  # also true for NaN
        why = f"the stacked one is {distance:.2g} of a hidden state away from it, over {bound:.2g}"
        return None, f"its own forward: {why}"
    how = f"stacked: {distance:.2g} of a hidden state away from its own forward, where {bound:.2g} may be rounding"
    shared = "its weights were stacked for another model, and are shared" if forward.shares_stacks else ""
    return forward, "; ".join(filter(None, (how, shared, chosen)))


def tolerance(decoder: Any) -> float:
    """Return how far two ways of rounding may be apart, as a share of the hidden states' norm.

    A number that is rounded to units of 2u has an error of u/√3 of it. Two computations of n roundings each, one after
    the other, are u √(2n/3) apart; four times that is allowed. In bfloat16 this allows 0.2 for 32 layers. A wrong
    forward is off by 1, and an H100 was off by 0.044 (Llama-3-8B's shape, prototype of 2026-11-27).
    """
    dtype, unit = decoder.dtype, ROUNDING_UNIT[decoder.dtype]
    if dtype == torch.float32:
        unit = max(unit, PRODUCT_ROUNDING_UNIT[torch.get_float32_matmul_precision()])
    return 4 * unit * math.sqrt(2 * ROUNDINGS * len(decoder.layers) / 3)


def deviation(decoder: Any, forward: Callable[..., Any]) -> float:
    """Return the largest distance of any lane's hidden states, keys or values, as a share of their norm."""
    pairs = zip(*(trial(decoder, each, BLOCKS) for each in (decoder, forward)))
    return max(
        float((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).nan_to_num(math.inf))
        for theirs, ours in pairs
        for a, b in zip(theirs.float(), ours.float())
    )


def _unfit(decoder: Any) -> str | None:
    """Return why the decoder's layers can't run stacked, or None if they can."""
    if not built_as_known(decoder):
        return f"{type(decoder).__name__} with its hooks is none of {', '.join(WINDOWS)} as transformers builds them"
    groups = [group for layer in decoder.layers for group in _linears(layer)]
    linears = [linear for group in groups for linear in group]
    if any(type(linear) is not nn.Linear for linear in linears):
        return "some of its linears are no plain ones"
    devices = {parameter.device for parameter in decoder.parameters()}
    dtypes = {parameter.dtype for parameter in decoder.parameters()}
    if len(devices) > 1 or len(dtypes) > 1 or not dtypes <= ROUNDING_UNIT.keys():
        return f"its weights are on {len(devices)} devices in {len(dtypes)} dtypes"
    if any(type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation") for layer in decoder.layers):
        return "its activation isn't SiLU"
    if len({linear.weight.data_ptr() for linear in linears}) < len(linears):
        return "some of its layers share weights"
    for group in groups:
        stacks = [stack_of([linear]) for linear in group]
        if any(stack is not None for stack in stacks) and not (stacks[0] is not None and stacks[0].holds(group)):
            return "its weights are stacked for another model in another way"
    return None


def _linears(layer: Any) -> list[list[Any]]:
    """Return the linears of a layer, grouped by their input as a `StackedDecoder` stacks them."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    return [[bare_linear(module) for module in group] for group in groups]
