"""The stacked decoder in Triton's interpreter; test_stacked_decoder.py runs this file in a process of its own."""

import copy
import os
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import numpy
import pytest
import torch
from doubles import tensors_in
from tiny_models import VOCAB_SIZE, build_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from genarm_fast.kernels import _dispatch, _native
from genarm_fast.kernels.linear import Lora
from genarm_fast.kernels.ragged_attention import plan
from genarm_fast.models import few_rows
from genarm_fast.models.forward_context import Ragged, at_positions, running
from genarm_fast.models.kv_cache import RaggedLayer
from genarm_fast.models.lora_lanes import LaneLinear
from genarm_fast.models.stacked_decoder import StackedDecoder
from genarm_fast.models.weights import Movable

assert os.environ.get("TRITON_INTERPRET") == "1"
TARGETS = [
    ["self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"],
    ["self_attn.v_proj", "self_attn.o_proj"],
    ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"],
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "GPUS", ("cpu",))
    monkeypatch.setattr(_native, "core", None)


def adapted(model, adapters):
    """Return the model with a LoRA of different rank in each of lanes 1, 2, ..., and a merged model for each lane."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms of ones and biases of zeros would hide which one is used
            parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    tree, merged = copy.deepcopy(model), [copy.deepcopy(model) for _ in range(1 + adapters)]
    for depth, layer in enumerate(tree.model.layers):
        for path in sorted({path for targets in TARGETS[:adapters] for path in targets}):
            linear, loras = layer.get_submodule(path), {}
            for lane in range(1, 1 + adapters):
                if path in TARGETS[lane - 1]:
                    out, inputs = linear.weight.shape
                    a = torch.randn(1 + lane, inputs, generator=generator) / 4
                    loras[lane] = Lora(a, torch.randn(1 + lane, out, generator=generator) / 4, 0.5)
                    weight = merged[lane].model.layers[depth].get_submodule(path).weight
                    weight.data += 0.5 * loras[lane].b.T @ a
            layer.set_submodule(path, LaneLinear(linear, loras))
    return tree, merged


def hidden_states(decoder, tokens, lanes, blocks, slots=None):
    """Feed one row per lane and prompt, block after block; return hidden states [lanes, rows, tokens, width].

    slots: slots of the rows, by default in reverse order.
    """
    rows, found, start = len(tokens) * len(lanes), [], 0
    slots = torch.arange(rows).flip(0) if slots is None else slots
    cache = Cache(layers=[RaggedLayer(rows, tokens.shape[1]) for _ in decoder.layers])
    for block in blocks:
        where = torch.arange(start, start + block).expand(rows, block)
        ids = tokens[:, start : start + block].repeat(len(lanes), 1)
        ragged = Ragged(slots, where, start + block)
        with torch.inference_mode(), running(lanes, len(tokens)), at_positions(ragged):
            out = decoder(input_ids=ids, position_ids=where, past_key_values=cache).last_hidden_state
        found.append(out.view(len(lanes), len(tokens), block, -1))
        start += block
    return torch.cat(found, 2)


BLOCKS = [(4, 1, 9), (9, 4, 1), (1, 9, 4)]  # tokens of each forward; the first is a chunk of a prompt
LANES = [[0], [0, 1], [2, 0, 3, 1]]  # the model itself, with one adapter, with three


@pytest.mark.parametrize(
    ("family", "layers", "rows", "lanes", "blocks", "order"),
    [
        ("llama", 2, 1, [2, 0, 1], BLOCKS[0], 1),
        ("llama", 1, 2, [1], BLOCKS[1], 0),
        *(
            (family, 1, 2 if lanes == [0] else 1, lanes, BLOCKS[(i + n) % 3], (i + 2 * n) % 3)
            for i, family in enumerate(("llama", "mistral", "qwen2", "qwen3"))
            for n, lanes in enumerate(LANES)
        ),
    ],
)
def test_as_the_model_itself(family, layers, rows, lanes, blocks, order):
    """Each lane equals a merged model, over whole prefixes, beyond the sliding window. order: order of the slots."""
    tree, merged = adapted(build_model(family, 0, num_hidden_layers=layers), max(lanes))
    tokens = torch.arange(rows * 14).view(rows, 14) * 7 % VOCAB_SIZE
    slots = torch.arange(rows * len(lanes))
    slots = (slots, slots.flip(0), slots.roll(1))[order]
    got = hidden_states(StackedDecoder(tree.model, Movable([tree])), tokens, lanes, blocks, slots)
    with torch.no_grad():
        expected = torch.stack([merged[lane].model(tokens, use_cache=False).last_hidden_state for lane in lanes])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(lanes) == 1 or not torch.allclose(got[0], got[-1], atol=1e-2)  # the lanes differ


def test_products_of_few_rows_by_our_kernel():
    """The few-rows kernel serves blocks of 4 and 1 tokens of three lanes (12 and 3 rows, with biases), cuBLAS blocks of
    9."""
    tree, merged = adapted(build_model("qwen2", 0, num_hidden_layers=1), 2)
    decoder, tokens = StackedDecoder(tree.model, Movable([tree])), torch.arange(14).view(1, 14) * 7 % VOCAB_SIZE
    for product in decoder.products:
        product.kernel_row_counts = frozenset(few_rows.MEASURED_ROWS)
    launches = Launches()
    with launches.counting():
        got = hidden_states(decoder, tokens, [0, 1, 2], (4, 1, 9))
    assert launches.names.count("few_rows_kernel") == 2 * 4
    with torch.no_grad():
        expected = torch.stack([each.model(tokens, use_cache=False).last_hidden_state for each in merged])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_weights_changed_in_place_count():
    tree, _ = adapted(build_model("llama", 0, num_hidden_layers=1), 1)
    decoder = StackedDecoder(tree.model, Movable([tree]))
    tokens = torch.arange(3).view(1, 3)
    layer = tree.model.layers[0]
    before = hidden_states(decoder, tokens, [1], (3,))
    with torch.no_grad():
        layer.self_attn.k_proj.weight.mul_(2)
    after = hidden_states(decoder, tokens, [1], (3,))
    assert not torch.allclose(before, after)
    layer.mlp.down_proj.loras[0].b.zero_()
    assert torch.equal(hidden_states(decoder, tokens, [1], (3,)), after)
    decoder.reread()
    assert not torch.allclose(hidden_states(decoder, tokens, [1], (3,)), after)


FREE = {"view", "t", "transpose", "slice", "select", "expand", "detach", "empty", "unsqueeze"}  # views, no kernels
FREE |= {"reshape", "flatten", "resolve_neg", "resolve_conj"}  # launch nothing on contiguous, plain tensors
FREE |= {"lt", "ge", "__or__", "any", "is_nonzero"}  # checks of slots, positions and adapters, only on the CPU


class Launches(TorchDispatchMode):
    """A mode that collects names of GPU launches: PyTorch's operations except views, and Triton's kernels."""

    def __init__(self):
        super().__init__()
        self.names, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.inside and name not in FREE:
            self.names.append(name)
        return func(*args, **kwargs or {})

    def finished(self):
        """Note that a kernel has ended."""

    @contextmanager
    def counting(self):
        run = InterpretedFunction.__getitem__

        def counted(kernel, grid):
            def launch(*args, **kwargs):
                self.names.append(kernel.fn.__name__)
                self.inside = True
                run(kernel, grid)(*args, **kwargs)
                self.inside = False
                self.finished()

            return launch

        with patch.object(InterpretedFunction, "__getitem__", counted), self:
            yield


@pytest.mark.parametrize(("family", "chunk"), [("llama", 256), ("llama", 16), ("qwen3", 256)])
def test_launches_of_a_layer(family, chunk, monkeypatch):
    """A layer takes nine launches, with the LoRAs of two lanes, whether a row's entries are one split or several."""
    monkeypatch.setattr(plan, "CHUNK", chunk)
    arrivals = torch.zeros(64, dtype=torch.int32)
    counts = []
    for layers in (1, 2):
        tree, _ = adapted(build_model(family, 0, num_hidden_layers=layers), 2)
        decoder = StackedDecoder(tree.model, Movable([tree]))
        cache = Cache(layers=[RaggedLayer(3, 64) for _ in range(layers)])
        positions = torch.full((3, 1), 40)
        inputs = {"input_ids": positions, "position_ids": positions, "past_key_values": cache}
        with (
            torch.inference_mode(),
            running([0, 1, 2], 1),
            at_positions(Ragged(torch.arange(3), positions, 64, arrivals)),
        ):
            decoder(**inputs)  # makes the caches
            launches = Launches()
            with launches.counting():
                decoder(**inputs)
        counts.append(launches.names)
    assert len(counts[1]) - len(counts[0]) == 9, counts[1]


class Reads(Launches):
    """A mode that counts the bytes each launch reads: an operation's inputs, or the addresses that a kernel loads.

    bytes: counts by owner of the memory: weights, caches, others. A byte read several times in a launch counts once.
    """

    def __init__(self, weights, caches):
        super().__init__()
        self.bytes = Counter()
        self.spans = {"weights": spans_of(weights), "caches": spans_of(caches)}
        self.addresses = []

    def kind(self, address):
        return next((kind for kind, spans in self.spans.items() if any(a <= address < b for a, b in spans)), "others")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside and func.overloadpacket.__name__ not in FREE:
            for tensor in {(t.data_ptr(), t.numel()): t for t in tensors_in([args, kwargs])}.values():
                self.bytes[self.kind(tensor.data_ptr())] += tensor.nbytes
        return super().__torch_dispatch__(func, types, args, kwargs)

    def finished(self):
        """Add up the addresses that the kernel loaded."""
        for size in {size for size, _ in self.addresses}:
            found = numpy.unique(numpy.concatenate([each for width, each in self.addresses if width == size]))
            for kind, spans in self.spans.items():
                own = sum((a <= found) & (found < b) for a, b in spans)
                self.bytes[kind] += size * int(own.sum())
                found = found[own == 0]
            self.bytes["others"] += size * len(found)
        self.addresses.clear()

    @contextmanager
    def counting(self):
        load = InterpreterBuilder.create_masked_load

        def counted(builder, ptrs, mask, *rest):
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            self.addresses.append((size, ptrs.data[mask.data].astype(numpy.int64)))
            return load(builder, ptrs, mask, *rest)

        with patch.object(InterpreterBuilder, "create_masked_load", counted), super().counting():
            yield


def spans_of(tensors):
    """Return (begin, end) of the memory of each storage behind the tensors."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return [(begin, begin + size) for begin, size in storages.items()]


def bytes_of_a_layer(at):
    """Return the bytes that a layer reads for a token at this position of three lanes of rank 16, and its weights'
    size.

    The layer has Llama-3-8B's shape, all of it eight times smaller.
    """
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 1}
    found = []
    for layers in (1, 2):
        base = build_model("llama", 0, num_hidden_layers=layers, **shape)
        weights = sum(p.nbytes for p in base.model.layers[0].parameters())
        for path in [n for n, module in base.named_modules() if isinstance(module, nn.Linear) and "layers" in n]:
            linear = base.get_submodule(path)
            out, inputs = linear.weight.shape
            lora = Lora(torch.zeros(2, inputs), torch.zeros(2, out), 1.0)
            base.set_submodule(path, LaneLinear(linear, dict.fromkeys((1, 2, 3), lora)))
        decoder = StackedDecoder(base.model, Movable([base]))
        cache = Cache(layers=[RaggedLayer(3, 64) for _ in range(layers)])
        positions = torch.full((3, 1), at)
        inputs = {"input_ids": positions, "position_ids": positions, "past_key_values": cache}
        with torch.inference_mode(), running([1, 2, 3], 1), at_positions(Ragged(torch.arange(3), positions, 64)):
            decoder(**inputs)  # makes the caches
            held = [*base.parameters(), *(t for p in decoder.products for t in (p.weight, p.b) if t is not None)]
            reads = Reads(held, [states for layer in cache.layers for states in (layer.keys, layer.values)])
            with reads.counting():
                decoder(**inputs)
        found.append(reads.bytes)
    return {kind: found[1][kind] - found[0][kind] for kind in found[1]}, weights


def test_bytes_of_a_step():
    """A step reads the weights once, at most 1.03 times the base's, the cache entries that rows wrote, and little
    else."""
    found, weights = bytes_of_a_layer(40)
    assert weights < found["weights"] <= 1.03 * weights
    assert found["caches"] == 3 * 41 * 2 * 128 * 4
    assert found["others"] <= 0.05 * weights
