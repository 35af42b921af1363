"""Fuzz cases for the ops of a decoder layer and of training, in C++ and in Triton's interpreter (fuzz_ops.py).

Each case draws random shapes, dtypes and places in memory, and compares the op with its reference in float64.
"""

from __future__ import annotations

import random
from importlib import import_module
from unittest.mock import patch

import torch
from fuzz_calls import (
    DTYPES,
    add_rms_norm,
    arm_logps,
    called,
    close,
    exact,
    gated_mul,
    map_odd,
    near,
    odd,
    product,
    ragged_append,
    ragged_attention,
    rms_norm,
    rotary,
    rotary_append,
    silu_mul,
)
from torch import Tensor

from genarm_fast import kernels
from genarm_fast.kernels.gated_mul.reference import ACTIVATIONS
from genarm_fast.kernels.gated_mul.reference import specification as gated_mul_reference
from genarm_fast.kernels.quant_linear import dequantize, quantize
from genarm_fast.kernels.rotary_append.reference import specification as rotary_append_reference


def norms(rng: random.Random, triton: bool) -> None:
    dtype, width, eps, offset = rng.choice(DTYPES), rng.randint(1, 200), 1e-6, rng.choice([0.0, 1.0])
    x, weight = torch.randn(rng.randint(0, 4), width), torch.randn(width)
    found, _ = called(rng, triton, rms_norm, [x, weight], dtype, eps, offset)
    close(found, kernels.rms_norm_reference(*exact(dtype, x, weight), eps, offset), dtype)
    y, lanes, merged = product(rng, (width,), dtype)
    hidden = torch.randn(*y.shape[:-1], width)
    (total, normed), _ = called(rng, triton, add_rms_norm, [hidden, y, weight], dtype, eps, offset, *lanes)
    close(total, exact(dtype, hidden)[0] + merged, dtype)
    # The sum is rounded before it is normalised.
    close(normed, kernels.rms_norm_reference(total.double(), *exact(dtype, weight), eps, offset), dtype)


def gates(rng: random.Random, triton: bool) -> None:
    dtype, width, activation = rng.choice(DTYPES), rng.randint(1, 300), rng.choice(list(ACTIVATIONS))
    gate, up = torch.randn(2, rng.randint(0, 4), width)
    found, _ = called(rng, triton, silu_mul, [gate, up], dtype)
    close(found, kernels.silu_mul_reference(*exact(dtype, gate, up)), dtype)
    y, lanes, merged = product(rng, (width, width), dtype)
    found, _ = called(rng, triton, gated_mul, [y], dtype, activation, *lanes)
    close(found, gated_mul_reference(merged, activation, None, None), dtype)


def rotations(rng: random.Random, triton: bool) -> None:
    dtype, width = rng.choice(DTYPES), 2 * rng.randint(1, 100)
    rows, block, heads = rng.randint(0, 3), rng.randint(1, 4), (rng.randint(1, 4), rng.randint(1, 2))
    turned = [torch.randn(rows, each, block, width) for each in heads]
    angles = list(torch.randn(2, rng.choice([1, rows]), block, width))
    found, _ = called(rng, triton, rotary, [*turned, *angles], dtype)
    for got, expected in zip(found, kernels.rotary_reference(*exact(dtype, *turned, *angles)), strict=True):
        close(got, expected, dtype)


def appending(rng: random.Random, triton: bool) -> None:
    """Check rotary_append: it writes the rows of a product into different slots, at any positions."""
    few = 2 if triton else 3  # the interpreter takes 0.5 s for the programs of these sizes
    dtype, kv_heads = rng.choice(DTYPES), rng.randint(1, few)
    heads, width, value_width = kv_heads * rng.randint(1, few), 2 * rng.randint(1, 20), rng.randint(1, 40)
    rows, block, capacity = rng.randint(1, few), rng.randint(1, few), rng.randint(3, 12)
    sizes = (heads * width, kv_heads * width, kv_heads * value_width)
    y, lanes, merged = product(rng, sizes, dtype, rows, block)
    cos, sin = torch.randn(2, rng.choice([1, rows]), block, width)
    caches = [torch.randn(4, kv_heads, capacity, each) for each in (width, value_width)]
    slots = torch.randperm(4)[:rows]
    positions = torch.stack([torch.randperm(capacity)[:block] for _ in range(rows)])
    normed, biased = rng.random() < 0.5, rng.random() < 0.5
    extra = [*(torch.randn(2, width) if normed else [None, None]), 1e-6, torch.randn(sum(sizes)) if biased else None]
    found, placed = called(
        rng, triton, rotary_append, [y, cos, sin, *caches, slots, positions, *extra], dtype, *lanes, in_place=(3, 4)
    )
    own = exact(dtype, cos, sin, *caches, *extra)
    whole = merged if own[7] is None else merged + own[7]
    expected = rotary_append_reference(whole, *own[:4], slots, positions, *own[4:7], None, None, None)
    for got, wanted in zip((found, *placed[3:5]), (expected, *own[2:4]), strict=True):
        close(got, wanted, dtype, 2.0)


def attention(rng: random.Random, triton: bool) -> None:
    dtype = rng.choice(DTYPES[: 3 if triton else 2])
    few = 2 if triton else 3  # the interpreter takes 0.5 s for the programs of these sizes
    rows, heads, group = rng.randint(0, few), rng.randint(1, few), rng.randint(1, few)
    width, value_width = rng.randint(1, 130), rng.randint(1, 130)
    capacity = rng.randint(1, 80)
    block = min(capacity, rng.choice([1, 2, 5, 9, 20]))
    caches = [torch.randn(4, heads, capacity, each) for each in (width, value_width)]
    new = [torch.randn(rows, heads, block, each) for each in (width, value_width)]
    slots = torch.randperm(4)[:rows]
    starts = torch.tensor([rng.randint(0, capacity - block) for _ in range(rows)]).long().view(rows, 1)
    positions = starts + torch.arange(block)
    _, placed = called(rng, triton, ragged_append, [*caches, *new, slots, positions], dtype, in_place=(0, 1))
    own = [tensor.to(dtype) for tensor in (*caches, *new)]
    kernels.ragged_append_reference(*own, slots, positions)
    assert all(torch.equal(x, y) for x, y in zip(placed, own[:2], strict=False)), "ragged_append"
    query = torch.randn(rows, heads * group, block, width)
    options = {"window": rng.choice([None, rng.randint(1, 90)]), "softcap": rng.choice([None, 10.0])}
    plans = import_module("genarm_fast.kernels.ragged_attention.plan")
    with patch.object(plans, "CHUNK", rng.choice([16, 256])), patch.object(plans, "TILE_BYTES", 1024):
        found, _ = called(rng, triton, ragged_attention, [query, *own[:2], slots, positions], dtype, *options.values())
    expected = kernels.ragged_attention_reference(
        *exact(dtype, query), own[0].double(), own[1].double(), slots, positions, scale=0.1, **options
    )
    close(found, expected, dtype)


def linears(rng: random.Random, triton: bool) -> None:
    """Check small_linear, quant_linear, and both together in SiblingLinears."""
    dtype, rows = rng.choice([torch.bfloat16, torch.float32]), rng.choice([rng.randint(0, 40), rng.randint(60, 80)])
    width, out, rank = rng.randint(1, 200), rng.randint(1, 100), rng.randint(1, 20)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
    bias = torch.randn(out).to(dtype) if rng.random() < 0.5 else None
    lora = kernels.Lora(torch.randn(rank, width).to(dtype), torch.randn(rank, out).to(dtype), 0.5)
    first = rng.randint(0, rows)
    span = first, rng.randint(first, rows)
    placed = [odd(rng, each) for each in (x, weight, bias)]
    found = kernels.small_linear(*placed, loras=[(*span, *map_odd(rng, lora[:2]), 0.5)])
    added = torch.zeros(rows, out, dtype=torch.float64)
    added[span[0] : span[1]] = 0.5 * (x[span[0] : span[1]].double() @ lora.a.double().T @ lora.b.double())
    plain = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    near(found, plain + added, 0.05 if dtype == torch.bfloat16 else 1e-5)
    siblings = [kernels.SmallLinear(weight, bias, [lora]), kernels.SmallLinear(weight[:1])]
    if dtype == torch.float32:
        if siblings[0]._core is not None:
            loras = [(*span, *lora)]
            assert torch.equal(found, kernels.small_linear_reference(x, weight, bias, loras=loras)), "float32"
    else:
        siblings.append(_quantized(rng, placed[0], x, weight, bias))
    spans = [[(*span, 0)], *[()] * (len(siblings) - 1)]
    for linear, own, y in zip(siblings, spans, kernels.SiblingLinears(siblings)(placed[0], spans), strict=True):
        assert torch.equal(linear(placed[0], own), y), "siblings"


def _quantized(
    rng: random.Random, placed: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> kernels.QuantLinear:
    """quant_linear over codes of this weight: its products of x, which lies at `placed` too, and its rows."""
    quantized, out = quantize(weight.float(), rng.choice([8, 4])), len(weight)
    found = kernels.quant_linear(placed, quantized, bias)
    assert torch.equal(found, kernels.quant_linear_reference(x, quantized, bias)), "quant_linear"
    held, indices = kernels.QuantLinear(quantized, bias), torch.randint(0, out, (rng.randint(0, 70),))
    expected = dequantize(quantized).bfloat16()[indices]
    assert torch.equal(held.rows(odd(rng, indices)), expected), "rows of quant_linear"
    return held


def logps(rng: random.Random, triton: bool) -> None:
    """Check arm_logps and its gradients."""
    dtype = rng.choice(DTYPES[:2])
    rows, tokens, width, vocab = rng.randint(0, 3), rng.randint(1, 6), rng.randint(1, 40), rng.randint(1, 300)
    hidden, weight = torch.randn(rows, tokens, width), torch.randn(vocab, width)
    labels = torch.randint(0, vocab, (rows, tokens))
    labels[torch.rand(rows, tokens) < 0.3] = -100
    options = {"bias": torch.randn(vocab) if rng.random() < 0.5 else None}
    options |= {"logit_scale": rng.choice([1.0, 0.5]), "softcap": rng.choice([None, 5.0])}
    streamed = import_module("genarm_fast.kernels.arm_logps.streamed")
    block = rng.choice([(2048, 1024), (rng.randint(1, 8), rng.randint(60, 150))])
    gradients = []
    for run, own in ((arm_logps, dtype), (kernels.arm_logps_reference, torch.float64)):
        inputs = [each if each is None else each.to(dtype).to(own) for each in (hidden, weight, options["bias"])]
        if run is arm_logps:
            inputs = [odd(rng, each) for each in inputs]
        leaves = [each.requires_grad_() for each in inputs if each is not None]
        rest = options | {"bias": inputs[2]} | ({"triton": triton} if run is arm_logps else {})
        with patch.dict(streamed.BLOCK, {"cpu": block}):
            result = run(*inputs[:2], labels, **rest)
            result.sum().backward()
        gradients.append([result.detach(), *(each.grad for each in leaves)])
    for found, expected in zip(*gradients, strict=True):
        near(found, expected, (0.15 if triton else 0.05) if dtype == torch.bfloat16 else 1e-4)


CASES = {
    "norms": norms,
    "gates": gates,
    "rotations": rotations,
    "appending": appending,
    "attention": attention,
    "logps": logps,
}
ONLY_ON_THE_CPU = {"linears": linears}
