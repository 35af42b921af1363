"""Attention over the ragged cache agrees with float64 and transformers. A query's bits do not depend on others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from genarm_fast.kernels import (
    _native,
    ragged_append,
    ragged_append_reference,
    ragged_attention,
    ragged_attention_reference,
)

ISAS = _native.core.instruction_sets() if _native.core else []
native = pytest.mark.skipif(not ISAS, reason="built without a compiler")
DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(4, 4), (6, 2), (9, 3), (8, 1)]


def problem(heads=(6, 2), widths=(64, 64), block=1, lengths=(5, 40, 64), capacity=64, dtype=torch.float32, seed=0):
    """Return query (a transpose), keys, values, slots, positions. Row n's last query sees lengths[n] entries."""
    generator = torch.Generator().manual_seed(seed)
    rows, slots = len(lengths), len(lengths) + 2
    query = torch.randn(rows, block, heads[0], widths[0], generator=generator).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(slots, heads[1], capacity, w, generator=generator).to(dtype) for w in widths)
    slot = torch.randperm(slots, generator=generator)[:rows]
    positions = torch.tensor(lengths)[:, None] - block + torch.arange(block)
    return query, keys, values, slot, positions


def exact(query, keys, values, slots, positions, *, scale, window=None, softcap=None):
    """Compute the definition in float64, query by query, over only the entries that the query sees."""
    out = torch.empty(len(query), query.shape[2], query.shape[1], values.shape[3], dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for n, i, h in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        end = int(positions[n, i]) + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        scores = keys[slots[n], h // group, seen].double() @ query[n, h, i].double() * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        out[n, i, h] = scores.softmax(-1) @ values[slots[n], h // group, seen].double()
    return out


def assert_exact(got, arguments, **options):
    """Allow the error of float32 sums, and one rounding to the result's dtype."""
    expected = exact(*arguments, **options)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=max(eps / 2, 1e-5), atol=4e-6)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 20.0}, {"window": 33, "softcap": 2.0}])
@pytest.mark.parametrize(("block", "width"), [(1, 64), (5, 64), (9, 48), (2, 17)])
def test_values(isa, dtype, heads, options, block, width):
    arguments = problem(heads, (width, width), block, lengths=(block, 40, 64), dtype=dtype)
    got = ragged_attention(*arguments, scale=width**-0.5, **options)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_exact(got, arguments, scale=width**-0.5, **options)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 20.0}, {"limit": 64}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference(options, dtype):
    arguments = problem(block=4, lengths=(4, 40, 64), capacity=80, dtype=dtype)
    got = ragged_attention_reference(*arguments, scale=0.1, **options)
    assert got.is_contiguous()
    options.pop("limit", None)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    expected = exact(*arguments, scale=0.1, **options)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@native
@pytest.mark.parametrize("forward", [sdpa_attention_forward, eager_attention_forward])
@pytest.mark.parametrize("heads", HEADS)
def test_transformers(forward, heads):
    """The op agrees with the attention functions of transformers that it replaces, given the mask of the same rows."""
    query, keys, values, slots, positions = problem(heads, block=3, lengths=(3, 40, 64))
    config = LlamaConfig(hidden_size=heads[0] * 64, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    module = LlamaAttention(config, 0).eval()
    mask = torch.where(torch.arange(64) <= positions[:, :, None], 0.0, -torch.inf)[:, None]
    expected, _ = forward(module, query, keys[slots], values[slots], mask, scaling=0.125, dropout=0.0)
    got = ragged_attention(query, keys, values, slots, positions, scale=0.125)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 10.0}])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_garbage_beyond_a_position(isa, dtype, options, garbage):
    """Entries that a query does not see change no bit of its result, even if a neighbour in its block sees them."""
    query, keys, values, slots, positions = problem(block=5, lengths=(5, 40, 60), dtype=dtype)
    clean = ragged_attention(query, keys, values, slots, positions, scale=0.2, **options)
    for token in range(5):
        dirty_keys, dirty_values = keys.clone(), values.clone()
        for n, slot in enumerate(slots):
            last = int(positions[n, token])
            unseen = torch.arange(64) > last
            if "window" in options:
                unseen |= torch.arange(64) <= last - options["window"]
            dirty_keys[slot, :, unseen] = garbage
            dirty_values[slot, :, unseen] = garbage
        dirty = ragged_attention(query, dirty_keys, dirty_values, slots, positions, scale=0.2, **options)
        assert torch.equal(dirty[:, token], clean[:, token])
    dirty_keys[slots[0], :, 0] = garbage
    touched = ragged_attention(query, dirty_keys, dirty_values, slots, positions, scale=0.2)
    assert not torch.equal(touched[0, 4], clean[0, 4])  # control: garbage that is seen


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_reference_ignores_what_was_never_written(softcap):
    query, keys, values, slots, positions = problem(block=2, lengths=(5, 40, 60))
    clean = ragged_attention_reference(query, keys, values, slots, positions, scale=0.2, softcap=softcap)
    for n, slot in enumerate(slots):
        keys[slot, :, int(positions[n, -1]) + 1 :] = torch.nan
        values[slot, :, int(positions[n, -1]) + 1 :] = torch.inf
    dirty = ragged_attention_reference(query, keys, values, slots, positions, scale=0.2, softcap=softcap)
    assert torch.equal(clean, dirty)


@native
def test_a_nan_that_is_seen_is_reported(isa):
    arguments = problem(block=1, lengths=(5, 40, 60))
    arguments[1][arguments[3][1], 0, 3] = torch.nan
    got = ragged_attention(*arguments, scale=0.2)
    assert got[1, 0, :3].isnan().all()
    assert not got[1, 0, 3:].isnan().any()
    assert not got[[0, 2]].isnan().any()


def alone(query, keys, values, slots, positions, **options):
    """Compute every row and token in a separate call, over a cache that ends at its position."""
    out = []
    for n, i in torch.cartesian_prod(*map(torch.arange, positions.shape)).tolist():
        last, slot = positions[n : n + 1, i : i + 1], slots[n]
        end = int(last) + 1
        own = [cache[slot, None, :, :end].contiguous() for cache in (keys, values)]
        out.append(
            ragged_attention(query[n : n + 1, :, i : i + 1], *own, torch.zeros(1, dtype=torch.int64), last, **options)
        )
    return torch.cat(out).view(len(query), query.shape[2], query.shape[1], -1)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 10.0}])
@pytest.mark.parametrize(
    ("heads", "block", "width"), [((9, 3), 5, 64), ((4, 4), 9, 40), ((8, 1), 4, 96), ((3, 1), 60, 16)]
)
def test_company_changes_no_bit(isa, dtype, options, heads, block, width):
    """One row and token at a time gives the same bits as the whole batch of blocks over a larger cache."""
    arguments = problem(heads, (width, width), block, lengths=(block, 80, 127), capacity=130, dtype=dtype)
    together = ragged_attention(*arguments, scale=0.3, **options)
    assert torch.equal(alone(*arguments, scale=0.3, **options), together)


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    arguments = problem((9, 3), block=64, lengths=(64, 400, 512), capacity=512, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = [ragged_attention(*arguments, scale=0.3) for _ in range(3)]
        torch.set_num_threads(1)
        one = ragged_attention(*arguments, scale=0.3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for other in many)


@native
def test_company_test_can_fail():
    """PyTorch's sdpa fails the test above, so the test's data can show a difference."""
    query, keys, values, slots, positions = problem((9, 3), block=5, lengths=(5, 80, 127), capacity=130)
    together = ragged_attention_reference(query, keys, values, slots, positions, scale=0.3)
    assert not torch.equal(alone(query, keys, values, slots, positions, scale=0.3), together)


@native
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    _native.core.use(data.draw(st.sampled_from(ISAS), "isa"))
    try:
        block = data.draw(st.integers(1, 9), "block")
        capacity = data.draw(st.integers(block, 90), "capacity")
        lengths = data.draw(st.lists(st.integers(block, capacity), min_size=1, max_size=4), "lengths")
        kv_heads, group = data.draw(st.integers(1, 3), "kv_heads"), data.draw(st.integers(1, 8), "group")
        widths = data.draw(st.tuples(st.integers(1, 130), st.integers(1, 130)), "widths")
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        arguments = problem((kv_heads * group, kv_heads), widths, block, lengths, capacity, dtype)
        window = data.draw(st.none() | st.integers(1, 90), "window")
        options = {"scale": widths[0] ** -0.5, "window": window, "softcap": data.draw(st.sampled_from([None, 3.0]))}
        got = ragged_attention(*arguments, **options)
        assert_exact(got, arguments, **options)
        assert torch.equal(alone(*arguments, **options), got)
    finally:
        _native.core.use(ISAS[0])


@pytest.mark.parametrize("which", range(3))
def test_what_needs_a_gradient_gets_it(which):
    arguments = problem(block=2)
    arguments[which].requires_grad_()
    ragged_attention(*arguments, scale=0.1).sum().backward()
    assert arguments[which].grad is not None


def test_appended_keys_that_need_a_gradient_get_it():
    query, keys, values, slots, positions = problem(block=2)
    new = torch.ones(3, 2, 2, 64, requires_grad=True)
    ragged_append(keys, values, new, new, slots, positions)
    ragged_attention(query, keys, values, slots, positions, scale=0.1).sum().backward()
    assert new.grad.abs().sum() > 0


@pytest.mark.parametrize("attend", [ragged_attention, ragged_attention_reference])
def test_nothing_to_attend(attend):
    """A call without rows, queries or heads gives an empty result of the right shape."""
    query, keys, values, slots, positions = problem(block=2)
    assert attend(query[:0], keys, values, slots[:0], positions[:0], scale=1.0).shape == (0, 2, 6, 64)
    assert attend(query[:, :0], keys, values, slots, positions, scale=1.0).shape == (3, 2, 0, 64)
    assert attend(query[:, :, :0], keys, values, slots, positions[:, :0], scale=1.0).shape == (3, 0, 6, 64)


@native
def test_strides(isa):
    query, keys, values, slots, positions = problem(block=4, lengths=(4, 40, 64))
    expected = ragged_attention(query, keys, values, slots, positions, scale=0.1)
    turned = query.transpose(1, 3).contiguous().transpose(1, 3)  # the last stride is not 1
    wide = torch.stack([positions, positions], -1)[..., 0]
    caches = torch.cat([keys, values], -1).split([64, 64], -1)
    token_first = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values)]
    assert torch.equal(ragged_attention(turned, *caches, slots, wide, scale=0.1), expected)
    assert torch.equal(ragged_attention(query, *token_first, slots, positions, scale=0.1), expected)


@pytest.mark.parametrize("append", [ragged_append, ragged_append_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_append(append, dtype):
    _, keys, values, slots, positions = problem(widths=(16, 24), block=3, lengths=(3, 40, 64), dtype=dtype)
    expected = keys.clone(), values.clone()
    new = [torch.randn(3, 3, 2, width).to(dtype).transpose(1, 2) for width in (16, 24)]
    for n, i in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
        for cache, tokens in zip(expected, new, strict=True):
            cache[slots[n], :, positions[n, i]] = tokens[n, :, i]
    append(keys, values, *new, slots, positions)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("core", [_native.core, None])
@pytest.mark.parametrize(
    ("slots", "positions", "message"),
    [
        ([0, 5], [[0, 1], [0, 1]], r"slots(\[1\] = 5| from 0 to 5): expected 0\.\.4"),
        ([-1, 0], [[0, 1], [0, 1]], r"slots(\[0\] = -1| from -1 to 0): expected 0\.\.4"),
        ([0, 1], [[0, 1], [63, 64]], r"positions(\[1, 1\] = 64| from 0 to 64): expected 0\.\.63"),
        ([0, 1], [[-1, 0], [0, 1]], r"positions(\[0, 0\] = -1| from -1 to 1): expected 0\.\.63"),
    ],
)
def test_out_of_range(monkeypatch, core, slots, positions, message):
    monkeypatch.setattr(_native, "core", core)
    query, keys, values, *_ = problem(block=2, lengths=(3, 40, 64))
    slots, positions = torch.tensor(slots), torch.tensor(positions)
    before = keys.clone(), values.clone()
    new = torch.ones(2, 2, 2, 64)
    with pytest.raises(ValueError, match=message):
        ragged_append(keys, values, new, new, slots, positions)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    with pytest.raises(ValueError, match=message):
        ragged_attention(query[:2], keys, values, slots, positions, scale=1.0)


def test_arguments_are_checked():
    query, keys, values, slots, positions = problem()
    with pytest.raises(ValueError, match=r"query of shape \(3, 6\): expected \[N, Hq, q, D\]"):
        ragged_attention(query[..., 0, 0], keys, values, slots, positions, scale=1.0)
    with pytest.raises(ValueError, match="6 query heads: expected a multiple of the 4 heads"):
        ragged_attention(query, *(x.repeat(1, 2, 1, 1) for x in (keys, values)), slots, positions, scale=1.0)
    with pytest.raises(ValueError, match="expected a width of 64, as query has"):
        ragged_attention(query, keys[..., :63], values, slots, positions, scale=1.0)
    with pytest.raises(ValueError, match=r"expected \[S, Hkv, C, D\] and \[S, Hkv, C, Dv\]"):
        ragged_attention(query, keys, values[:1], slots, positions, scale=1.0)
    with pytest.raises(ValueError, match=r"positions of shape \(2, 1\): expected \(3, 1\)"):
        ragged_attention(query, keys, values, slots, positions[:2], scale=1.0)
    with pytest.raises(ValueError, match="window=0: expected an integer of at least 1"):
        ragged_attention(query, keys, values, slots, positions, scale=1.0, window=0)
    with pytest.raises(ValueError, match="6 query heads: expected a multiple of the 0 heads"):
        ragged_attention(query, keys[:, :0], values[:, :0], slots, positions, scale=1.0)
    for options, message in (
        ({"scale": None}, "scale=None: expected a number"),
        ({"window": 1.5}, "window=1.5: expected an integer"),
        ({"softcap": 0.0}, "softcap=0.0: expected a finite number above 0"),
        ({"softcap": float("inf")}, "softcap=inf: expected a finite number above 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ragged_attention(query, keys, values, slots, positions, **({"scale": 1.0} | options))
    for limit, message in ((0, "limit=0: expected an integer of at least 1"), (65, "limit=65: expected at most 64")):
        with pytest.raises(ValueError, match=message):
            ragged_attention_reference(query, keys, values, slots, positions, scale=1.0, limit=limit)
    with pytest.raises(TypeError, match=r"slots of dtype torch.int32: expected int64"):
        ragged_attention(query, keys, values, slots.int(), positions, scale=1.0)
    with pytest.raises(TypeError, match=r"query of torch.bfloat16, keys of torch.float32"):
        ragged_attention(query.bfloat16(), keys, values, slots, positions, scale=1.0)
    new = torch.ones(3, 2, 1, 64)
    with pytest.raises(ValueError, match=r"new_values of shape \(3, 2, 1, 63\): expected \(3, 2, 1, 64\)"):
        ragged_append(keys, values, new, new[..., :63], slots, positions)
    with pytest.raises(TypeError, match=r"new_keys of dtype torch.float16: expected torch.float32"):
        ragged_append(keys, values, new.half(), new, slots, positions)


def test_attention_of_pytorch_need_not_be_contiguous(monkeypatch):
    """sdpa on CUDA may return a tensor whose memory has heads inside positions. The op's result is the same."""
    query, keys, values = (torch.randn(2, heads, n, 8) for heads, n in ((4, 3), (2, 6), (2, 6)))
    slots, positions = torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = ragged_attention_reference(query, keys, values, slots, positions, scale=0.3)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(ragged_attention_reference(query, keys, values, slots, positions, scale=0.3), expected)
