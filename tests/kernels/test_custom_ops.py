"""The custom ops under torch.compile and torch.export are one node each, and give the same results."""

import pytest
import torch
from torch.library import opcheck

from genarm_fast.kernels import (
    Lora,
    SmallLinear,
    guided_sample,
    ragged_append,
    ragged_attention,
    rms_norm,
    rotary,
    settle,
    silu_mul,
    small_linear,
)
from genarm_fast.kernels.arm_logps import IGNORE, arm_logps

ops = torch.ops.genarm_fast


def logits(*shape, members=2):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(*shape, generator=generator) for _ in range(members)]


@pytest.mark.parametrize("shape", [(3, 50), (3, 2, 50)])
@pytest.mark.parametrize(("logprobs", "top"), [(False, 0), (True, 0), (False, 4)])
def test_guided_sample_is_a_sound_op(shape, logprobs, top):
    base, *arms = logits(*shape)
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    positions = zeros.view(3, 1).expand(shape[:-1]) if len(shape) == 3 else zeros
    for filters in ((zeros, ones, 0 * ones), (None, None, None)):
        parameters = (zeros, positions, ones, *filters)
        opcheck(ops.guided_sample, (base, arms, torch.ones(1), *parameters, 50, None, logprobs, top))


def block(rows=5):
    row = torch.arange(rows)
    rest = {"lengths": row, "limits": row + 2, "finished": row > 3, "stop_ids": torch.tensor([1, -1])}
    targets = torch.arange(3 * rows).view(rows, 3) % 4
    return targets, targets[:, :2], rest


@pytest.mark.parametrize("ragged", [True, False])
def test_settle_is_a_sound_op(ragged):
    targets, drafts, rest = block()
    opcheck(ops.settle, (targets, drafts.clone(), *rest.values(), targets[:, 0].clone() if ragged else None))


def test_ngram_lookup_is_a_sound_op():
    opcheck(ops.ngram_lookup, (torch.arange(20).view(2, 10) % 3, torch.tensor([10, 4]), 3, 4, 2))


def round_of(base, arm, positions, seeds):
    """Sample and settle as an engine compiles it. Nothing in it may break the graph."""
    drawn = guided_sample(base * 2, (arm,), [0.5], temperature=0.8, top_p=0.9, seeds=seeds, positions=positions,
                          return_logprobs=True, top_logprobs=2)  # fmt: skip
    row = drawn.tokens[:, 0]
    settled = settle(drawn.tokens, drawn.tokens[:, :-1], lengths=0 * row, limits=0 * row + 9, finished=row < 0,
                     stop_ids=row[:1])  # fmt: skip
    return (*drawn, *settled)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(round_of, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    seed = 7 if dynamic else 2**64 - 1  # in a dynamic graph the seed is an input, which has to fit int64
    for rows in (3, 4) if dynamic else (3,):
        arguments = (*logits(rows, 2, 40), torch.arange(2 * rows).view(rows, 2), seed)
        expected = round_of(*arguments)
        assert all(torch.equal(x, y) for x, y in zip(compiled(*arguments), expected, strict=True))


def test_compiled_without_log_probabilities():
    torch._dynamo.reset()
    base, arm = logits(2, 30)

    def draw(base, arm):
        return guided_sample(base, (arm,), torch.ones(1), seeds=torch.arange(2), positions=0)

    found = torch.compile(draw, fullgraph=True, backend="aot_eager")(base, arm)
    assert torch.equal(found.tokens, draw(base, arm).tokens)
    assert found.logprobs is None


def test_exported():
    class Round(torch.nn.Module):
        def forward(self, base, arm, positions):
            return round_of(base, arm, positions, 7)

    arguments = (*logits(3, 2, 40), torch.arange(6).view(3, 2))
    program = torch.export.export(Round(), arguments)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"genarm_fast.guided_sample.default", "genarm_fast.settle.default"} <= targets
    assert all(torch.equal(x, y) for x, y in zip(program.module()(*arguments), Round()(*arguments), strict=True))


def training_batch(bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    labels = torch.randint(0, 30, (2, 5), generator=generator)
    labels[0, :2] = IGNORE
    return hidden, weight, labels, torch.randn(30, generator=generator) if bias else None


@pytest.mark.parametrize(("bias", "softcap"), [(True, None), (False, 5.0)])
def test_arm_logps_is_a_sound_op(bias, softcap):
    hidden, weight, labels, b = training_batch(bias)
    opcheck(ops.arm_logps, (hidden.requires_grad_(), weight.requires_grad_(), labels, b, 0.5, softcap))


@pytest.mark.parametrize("trained", ["hidden", "hidden, weight and bias"])
def test_arm_logps_compiled(trained):
    torch._dynamo.reset()
    hidden, weight, labels, bias = training_batch(True)
    leaves = [hidden, weight, bias] if "weight" in trained else [hidden]
    for leaf in leaves:
        leaf.requires_grad_()

    def loss(hidden, weight, bias):
        return (arm_logps(2 * hidden, weight, labels, bias=bias, softcap=9.0) * torch.tensor([1.0, -2.0])).sum()

    expected = loss(hidden, weight, bias)
    gradients = torch.autograd.grad(expected, leaves)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, bias)
    torch.testing.assert_close(found, expected)
    for got, exact in zip(torch.autograd.grad(found, leaves), gradients, strict=True):
        torch.testing.assert_close(got, exact)


def test_small_linear_is_a_sound_op():
    x, weight, a = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 8)
    opcheck(ops.small_linear, (x, weight, weight[:, 0].clone(), [a], [torch.randn(2, 6)], [0.5], [1, 3]))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 5.0)])
def test_ragged_ops_are_sound(window, softcap):
    keys, values = torch.randn(3, 2, 9, 4), torch.randn(3, 2, 9, 5)
    slots, positions = torch.tensor([2, 0]), torch.tensor([[1, 2], [5, 6]])
    query, new = torch.randn(2, 4, 2, 4), torch.randn(2, 2, 2, 5)
    opcheck(ops.ragged_attention, (query, keys, values, slots, positions, 0.5, window, softcap, None))
    opcheck(ops.ragged_append, (keys, values, query[:, :2].clone(), new, slots, positions))


@pytest.mark.parametrize("index", [None, torch.tensor([1, -1])])
def test_the_ops_of_a_fused_layer_are_sound(index):
    def product(out, parts):
        y = torch.randn(2, 3, out + 2 * parts * 2 * (index is not None))
        return y, None if index is None else torch.randn(2, 2, out)

    y, b = product(8, 1)
    opcheck(ops.add_rms_norm, (torch.randn(2, 3, 8), y, torch.randn(8), 1e-5, 0.0, b, index))
    y, b = product(16, 2)
    opcheck(ops.gated_mul, (y, "silu", b, index))
    y, b = product(32, 3)
    keys, values, cos = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(1, 3, 4)
    places = (torch.tensor([1, 0]), torch.tensor([[0, 1, 2], [2, 3, 4]]))
    norm = torch.randn(4)
    opcheck(
        ops.rotary_append, (y, cos, cos + 1, keys, values, *places, norm, norm + 1, 1e-6, torch.randn(32), b, index)
    )


class Layer:
    """A decoder layer made of all ops. The caches are arguments of its calls."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return (torch.randn(*shape, generator=generator) / 4).to(dtype)

        self.qkv = SmallLinear(normal(32, 16), normal(32), [Lora(normal(2, 16), normal(2, 32), 0.5)])
        self.out, self.norm = normal(16, 16), normal(16)
        self.cos, self.sin = normal(1, 2, 4), normal(1, 2, 4)

    def __call__(self, x, keys, values, slots, positions):
        normed = rms_norm(x, self.norm, 1e-5)
        states = self.qkv(normed, ((2, 4, 0),)).view(2, 2, 8, 4).transpose(1, 2)
        query, key = rotary(states[:, :4], states[:, 4:6], self.cos, self.sin)
        ragged_append(keys, values, key, states[:, 6:], slots, positions)
        attended = ragged_attention(query, keys, values, slots, positions, scale=0.5)
        return silu_mul(small_linear(attended.flatten(2), self.out), x), keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_a_layer_is_one_graph(how, dtype):
    torch._dynamo.reset()
    layer, x = Layer(dtype), torch.randn(2, 2, 16).to(dtype)
    slots, positions = torch.tensor([2, 0]), torch.tensor([[0, 1], [3, 4]])

    def arguments():  # new caches for each call, since the layer writes to them
        cache = torch.linspace(-1, 1, 3 * 2 * 6 * 4).view(3, 2, 6, 4).to(dtype)
        return x, cache, cache.flip(0), slots, positions

    with torch.inference_mode():
        expected = layer(*arguments())
    with torch.no_grad():
        if how == "compiled":
            found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments())
        else:
            module = torch.nn.Module()
            module.forward = layer.__call__
            program = torch.export.export(module, arguments())
            targets = {str(node.target) for node in program.graph.nodes}
            assert {
                f"genarm_fast.{op}.default" for op in ("small_linear", "ragged_append", "ragged_attention")
            } <= targets
            found = program.module()(*arguments())
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact)


def test_spans_of_a_compiled_linear():
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    weight, a, b, x = (torch.randn(shape, generator=generator).bfloat16() for shape in ((6, 8), (2, 8), (2, 6), (4, 8)))
    linear = SmallLinear(weight, None, [Lora(a, b, 0.5)])

    def half(x):
        return linear(x, [(0, len(x) // 2, 0)])

    compiled = torch.compile(half, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3, 4):
        torch.testing.assert_close(compiled(x[:rows]), half(x[:rows]))
    with pytest.raises(Exception, match="span \\(0, 1, -1\\): expected"):
        torch.compile(lambda x: linear(x, [(0, 1, -1)]), backend="aot_eager")(x)
    for op in (linear, lambda x: small_linear(x, weight)):
        with pytest.raises(ValueError, match=r"small_linear: .*no gradient"):
            torch.compile(op, backend="aot_eager")(x.clone().requires_grad_())
