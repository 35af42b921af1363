"""The fuzz case (fuzz_ops.py) that compares all decoder layers in one C++ call with the same ops called one by one."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import torch
from tiny_models import build_model
from transformers import Cache

from genarm_fast.kernels.linear import Lora
from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.forward_context import Ragged, at_positions, running
from genarm_fast.models.kv_cache import RaggedLayer
from genarm_fast.models.lora_lanes import LaneLinear
from genarm_fast.models.one_call import OneCall
from genarm_fast.models.quantized import quantize_model
from genarm_fast.models.weights import share_weights

VOCABULARY = 40
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def decoders(rng: random.Random, triton: bool) -> None:
    decoder = _decoder(rng, adapters=rng.randint(0, 2))
    lanes = rng.sample(range(3), rng.randint(1, 3))
    slots, rows, capacity = rng.randint(1, 3), 0, rng.choice([5, 17, 40])
    one, each = _cache(decoder, 3 * slots, capacity), _cache(decoder, 3 * slots, capacity)
    for _ in range(rng.randint(1, 3)):
        rows, block = rng.randint(1, slots), rng.choice([1, 1, 3, 5])
        where = torch.tensor([rng.randint(0, capacity - block) for _ in range(len(lanes) * rows)])[:, None]
        positions = where + torch.arange(block)
        chosen = torch.tensor([lane * slots + slot for lane in range(len(lanes)) for slot in range(rows)])
        given = {"input_ids": torch.randint(0, VOCABULARY, positions.shape), "position_ids": positions}
        with torch.inference_mode(), running(lanes, rows), at_positions(Ragged(chosen, positions, capacity)):
            found = decoder(**given, past_key_values=one)
            with patch.object(OneCall, "__call__", lambda *_: None):
                expected = decoder(**given, past_key_values=each)
        assert torch.equal(found.last_hidden_state.nan_to_num(7), expected.last_hidden_state.nan_to_num(7))
    pairs = ((a, b) for x, y in zip(one.layers, each.layers) for a, b in ((x.keys, y.keys), (x.values, y.values)))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


def _decoder(rng: random.Random, adapters: int) -> Any:
    kv_heads = rng.randint(1, 3)
    heads = kv_heads * rng.randint(1, 3)
    sizes = {
        "hidden_size": heads * rng.randint(1, 12), "intermediate_size": rng.randint(1, 140),
        "num_hidden_layers": rng.randint(1, 3), "num_key_value_heads": kv_heads, "num_attention_heads": heads,
        "head_dim": 2 * rng.randint(1, 12), "initializer_range": rng.choice([0.02, 0.3, 1.0]),
    }  # fmt: skip
    family = rng.choice(["llama", "mistral", "qwen3"])
    sizes |= {"sliding_window": rng.choice([1, 4, None])} if family == "mistral" else {}
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    model = build_model(family, rng.getrandbits(31), VOCABULARY, **sizes).to(dtype)
    if dtype == torch.bfloat16 and rng.random() < 0.7:
        quantize_model("fuzz", model, rng.choice(["int8", "int4"]))
    model = share_weights(model)
    for layer in model.base_model.layers:
        for path in rng.sample(LINEARS, rng.randint(0, len(LINEARS)) if adapters else 0):
            linear = layer.get_submodule(path)
            out, inputs = linear.weight.shape
            loras = {}
            for lane in rng.sample(range(3), adapters):
                rank = rng.randint(1, 5)
                a, b = torch.randn(rank, inputs).to(dtype), torch.randn(rank, out).to(dtype)
                loras[lane] = Lora(a, b, rng.choice([0.5, -2.0]))
            layer.set_submodule(path, LaneLinear(linear, loras))
    return make_fast(model).base_model


def _cache(decoder: Any, slots: int, capacity: int) -> Cache:
    return Cache(layers=[RaggedLayer(slots, capacity) for _ in decoder.layers])
