"""flash-attn is asked to compute what `ragged_attention` computes; a stand-in replaces it on the CPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model

from genarm_fast.models import flash_attention as flash
from genarm_fast.models.attention import attend
from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.forward_context import Ragged, at_positions


class OnCuda(torch.Tensor):
    """A tensor that claims to be on CUDA."""

    is_cuda = True


def stand_in(q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx, softmax_scale, causal, window_size, softcap):
    """Attend as the package documents: with a causal mask aligned with the last key of each sequence."""
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert causal
    rows, width, heads, dim = q.shape
    out = torch.empty(rows, width, heads, v_cache.shape[-1])
    group = heads // k_cache.shape[2]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    for n, (slot, length) in enumerate(zip(cache_batch_idx.tolist(), cache_seqlens.tolist())):
        for i in range(width):
            last = length - width + i
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            for h in range(heads):
                keys, values = (c[slot, first : last + 1, h // group].float() for c in (k_cache, v_cache))
                scores = scale * (keys @ q[n, i, h].float())
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                out[n, i, h] = scores.softmax(0) @ values
    return out.to(q.dtype)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 3.0}, {"scaling": 0.7}])
def test_equals_our_attention(monkeypatch, width, options):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=stand_in))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, width, 16, generator=generator, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 5, 2, 32, 16, generator=generator).to(torch.bfloat16)
    slots, starts = torch.tensor([4, 0, 2]), torch.tensor([0, 9, 20])
    positions = starts[:, None] + torch.arange(width)
    with at_positions(Ragged(slots, positions, 32)):
        expected, _ = attend(torch.nn.Identity(), query, keys, values, None, **options)
        found, _ = flash.attend_flash(torch.nn.Identity(), query.as_subclass(OnCuda), keys, values, None, **options)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=0.02, atol=0.02)


def test_what_it_cannot_do_is_left_to_ours(monkeypatch):
    """The calls work without the package, as they never ask for it."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    query, cache = torch.randn(1, 2, 1, 8), torch.randn(2, 1, 2, 4, 8)
    with at_positions(Ragged(torch.tensor([0]), torch.tensor([[2]]), 4)):
        for given in (query, query.as_subclass(OnCuda)):  # on the CPU, then in float32
            assert flash.attend_flash(torch.nn.Identity(), given, *cache, None)[0].shape == (1, 1, 2, 8)
        half = query.bfloat16().as_subclass(OnCuda)
        with pytest.raises(NotImplementedError, match="more than causal"):
            flash.attend_flash(torch.nn.Identity(), half, *cache.bfloat16(), torch.ones(1))


@pytest.mark.parametrize(
    ("wish", "given"), [("flash_attention_2", "genarm_fast_flash"), ("sdpa", "genarm_fast_ragged")]
)
def test_only_where_it_was_asked_for(wish, given):
    model = build_model("llama", 0)
    model.config._attn_implementation_internal = wish
    assert make_fast(model).config._attn_implementation == given
