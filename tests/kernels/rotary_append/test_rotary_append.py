"""rotary_append in PyTorch agrees with the attention modules of transformers, and refuses wrong arguments."""

import pytest
import torch
from stacked_products import stacked
from torch.nn import functional
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from genarm_fast.kernels import ragged_attention, rotary_append
from genarm_fast.models.forward_context import Ragged, at_positions
from genarm_fast.models.kv_cache import RaggedLayer


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_as_transformers(tiny_model, family):
    """With the op's queries, keys and values, attention gives the output of a model's own attention module."""
    model = tiny_model(family)
    module, rotate = model.model.layers[0].self_attn, model.model.rotary_emb
    x = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    slots, positions = torch.tensor([1, 0]), torch.tensor([[0, 1, 2], [4, 5, 6]])
    cos, sin = rotate(x, position_ids=positions)
    linears = [module.q_proj, module.k_proj, module.v_proj]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    heads, width = model.config.num_key_value_heads, module.head_dim
    keys, values = torch.zeros(2, heads, 8, width), torch.zeros(2, heads, 8, width)
    norms = {}
    if hasattr(module, "q_norm"):
        norms = {"query_norm": module.q_norm.weight, "key_norm": module.k_norm.weight}
    with torch.no_grad():
        y = functional.linear(x, torch.cat([linear.weight for linear in linears]))
        query = rotary_append(
            y, cos, sin, keys, values, slots, positions, bias=torch.cat(biases) if biases else None,
            eps=model.config.rms_norm_eps, **norms,
        )  # fmt: skip
        cache = Cache(layers=[RaggedLayer(2, 8)])
        module.config._attn_implementation, before = "genarm_fast_ragged", module.config._attn_implementation
        try:
            with at_positions(Ragged(slots, positions, 8)):
                expected, _ = module(x, position_embeddings=(cos, sin), attention_mask=None, past_key_values=cache)
        finally:
            module.config._attn_implementation = before
        out = ragged_attention(query.transpose(1, 2), keys, values, slots, positions, scale=module.scaling)
        torch.testing.assert_close(module.o_proj(out.flatten(2)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys, cache.layers[0].keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, cache.layers[0].values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanes(dtype):
    """Three lanes, of which the second has no adapter, give the keys, values and queries of merged weights."""
    sizes = (4 * 6, 2 * 6, 2 * 5)
    y, lanes, merged = stacked(sizes, (1, -1, 0), rows=6, dtype=dtype)
    keys, values = torch.zeros(3, 2, 4, 6, dtype=dtype), torch.zeros(3, 2, 4, 5, dtype=dtype)
    angle = torch.rand(3, 2, 6, dtype=dtype)
    slots, positions = torch.arange(3), torch.tensor([[0, 1], [2, 3], [1, 2]])
    query = rotary_append(y.view(3, 2, -1), angle.cos(), angle.sin(), keys, values, slots, positions, lanes=lanes)
    parts = [part.view(3, 2, heads, -1).transpose(1, 2) for part, heads in zip(merged.split(sizes, -1), (4, 2, 2))]
    first, second = apply_rotary_pos_emb(*parts[:2], angle.double().cos(), angle.double().sin())
    torch.testing.assert_close(query.transpose(1, 2).double(), first, rtol=1e-5, atol=1e-5)
    for cache, part in ((keys, second), (values, parts[2])):
        found = cache[slots[:, None], :, positions].transpose(1, 2).double()
        torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-5)


def faulty(**changes):
    given = {"y": torch.zeros(1, 2, 32), "cos": torch.zeros(1, 2, 4), "sin": torch.zeros(1, 2, 4)}
    given |= {"keys": torch.zeros(1, 2, 3, 4), "values": torch.zeros(1, 2, 3, 4)}
    given |= {"slots": torch.tensor([0]), "positions": torch.tensor([[0, 1]])}
    return rotary_append(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.zeros(2, 32)}, r"y of shape \(2, 32\): expected \[N, q, columns\]"),
        ({"y": torch.zeros(1, 2, 33)}, r"y of shape \(1, 2, 33\): expected columns of query heads of 4"),
        ({"y": torch.zeros(1, 2, 16)}, r"y of shape \(1, 2, 16\): expected columns of query heads of 4"),
        ({"cos": torch.zeros(1, 2, 2)}, r"cos of shape \(1, 2, 2\): expected \[1 or 1, 2, 4\]"),
        ({"sin": torch.zeros(1, 2, 4).half()}, r"sin of torch.float16 on cpu: expected torch.float32"),
        ({"positions": torch.tensor([[0, 3]])}, r"positions.* 3: expected 0..2"),
        ({"slots": torch.tensor([1])}, r"slots.* 1: expected 0..0"),
        ({"query_norm": torch.zeros(4)}, "query_norm and key_norm: expected both or neither"),
        ({"query_norm": torch.zeros(4), "key_norm": torch.zeros(5)}, r"key_norm of shape \(5,\): expected \(4,\)"),
        ({"bias": torch.zeros(31)}, r"bias of shape \(31,\): expected \(32,\)"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        faulty(**changes)
    assert faulty().shape == (1, 2, 4, 4)
