"""rotary gives the bits of transformers' apply_rotary_pos_emb."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from genarm_fast.kernels import _native, rotary

ISAS = _native.core.instruction_sets() if _native.core else []


@pytest.fixture(params=[*ISAS, None])
def isa(request, monkeypatch):
    if request.param is None:
        monkeypatch.setattr(_native, "core", None)
        yield None
        return
    _native.core.use(request.param)
    yield request.param
    _native.core.use(ISAS[0])


def inputs(dtype, rows=2, angles=2, block=3, width=64):
    generator = torch.Generator().manual_seed(width)
    query, key = (
        torch.randn(rows, block, heads, width, generator=generator).to(dtype).transpose(1, 2) for heads in (6, 2)
    )
    angle = 10 * torch.rand(angles, block, width, generator=generator)
    return query, key, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 10, 16, 64, 80, 128, 250])
@pytest.mark.parametrize("angles", [1, 2])
def test_as_transformers(isa, dtype, width, angles):
    arguments = inputs(dtype, angles=angles, width=width)
    for got, expected in zip(rotary(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def test_strides(isa):
    query, key, cos, sin = inputs(torch.bfloat16)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    wide = torch.cat([query, query], -1)[..., :64]
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    for first, second in ((wide, key), (query, turned), (query.contiguous(), key.contiguous())):
        got = rotary(first, second, cos.expand(2, 3, 64), torch.stack([sin, sin])[1])
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    last = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    got = rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    assert torch.equal(got[0], last[0])


def test_a_gradient_is_made():
    query, key, cos, sin = inputs(torch.float32)
    for leaf in (query, cos):
        leaf.requires_grad_()
        rotary(query.detach() if leaf is cos else query, key, cos, sin)[0].sum().backward()
        assert leaf.grad is not None
