"""The Triton kernels of attention under TRITON_INTERPRET=1. test_triton.py runs them in a new process."""

import itertools
import random
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from interpreter import between_canaries, bfloat16_products
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from genarm_fast.kernels import ragged_append_reference, ragged_attention_reference
from genarm_fast.kernels.ragged_attention import triton as kernels
from genarm_fast.kernels.ragged_attention.triton import attention
from genarm_fast.kernels.ragged_attention.triton_append import append

plans = sys.modules["genarm_fast.kernels.ragged_attention.plan"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Set constants so that caches of about 100 entries have several splits of 16 entries, and loops several turns."""
    monkeypatch.setattr(plans, "CHUNK", 16)
    monkeypatch.setattr(plans, "TILE_BYTES", 1024)
    monkeypatch.setattr(plans, "FLOAT32_BYTES", 1024)


def problem(block=1, heads=(4, 2), widths=(16, 16), lengths=(7, 75), capacity=80, dtype=torch.float32, seed=0):
    """Return query, keys, values, slots, positions. Row n's last query sees lengths[n] entries."""
    generator = torch.Generator().manual_seed(seed)
    rows, slots = len(lengths), len(lengths) + 1
    query = torch.randn(rows, block, heads[0], widths[0], generator=generator).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(slots, heads[1], capacity, w, generator=generator).to(dtype) for w in widths)
    positions = torch.tensor(lengths)[:, None] - block + torch.arange(block)
    return query, keys, values, torch.arange(slots).flip(0)[:rows], positions


def interpreted(
    query, keys, values, slots, positions, *, scale=0.3, window=None, softcap=None, limit=None, arrivals=None
):
    with between_canaries() as canaries, bfloat16_products():
        keys, values = canaries.embed(keys), canaries.embed(values)
        slots, positions = canaries.embed(slots), canaries.embed(positions)
        if arrivals is None:
            return attention(query, keys, values, slots, positions, scale, window, softcap, limit)
        counters = canaries.embed(arrivals)
        out = attention(query, keys, values, slots, positions, scale, window, softcap, limit, counters)
        arrivals.copy_(counters)
        return out


def assert_same(arguments, **options):
    got = interpreted(*arguments, **options)
    exact = (tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments)
    expected = ragged_attention_reference(*exact, **{"scale": 0.3, **options})
    assert got.is_contiguous()
    assert got.dtype == arguments[0].dtype
    # In bfloat16 the interpreter truncates weights and results, which a GPU rounds.
    tolerance = 1e-5 if got.dtype == torch.float32 else 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 37, "softcap": 5.0}, {"limit": 77}])
@pytest.mark.parametrize(("block", "heads"), [(1, (4, 2)), (4, (4, 2)), (16, (2, 1))])
def test_decode(block, heads, options):
    assert_same(problem(block, heads, lengths=(block, 77)), **options)


@contextmanager
def counting_loads(*tensors):
    """Count the elements of these tensors that a launch reads, without masked ones, in the list that is yielded."""
    load, read = InterpreterBuilder.create_masked_load, [0] * len(tensors)

    def counted(builder, ptrs, mask, *rest):
        places = ptrs.data[mask.data].astype("int64")
        for i, tensor in enumerate(tensors):
            start = tensor.untyped_storage().data_ptr()
            read[i] += int(((places >= start) & (places < start + tensor.untyped_storage().nbytes())).sum())
        return load(builder, ptrs, mask, *rest)

    with patch.object(InterpreterBuilder, "create_masked_load", counted):
        yield read


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"limit": 77}])
@pytest.mark.parametrize(("block", "heads"), [(1, (4, 2)), (4, (4, 2)), (16, (2, 1)), (4, (3, 1))])
def test_a_step_reads_once_what_its_queries_see(block, heads, options):
    """A key or value that a row's queries see is read once, for all heads of a group, queries and splits together."""
    lengths = (block, 33, 77)
    query, keys, values, slots, positions = problem(block, heads, lengths=lengths, dtype=torch.bfloat16)
    with counting_loads(keys, values) as read, bfloat16_products():
        attention(query, keys, values, slots, positions, 0.3, options.get("window"), None, options.get("limit"))
    seen = sum(min(length, options.get("window", length) + block - 1) for length in lengths)
    assert read == [seen * heads[1] * 16] * 2


def test_more_splits_than_are_combined_at_once():
    assert_same(problem(lengths=(140, 3), capacity=144))


@pytest.fixture
def launched(monkeypatch):
    """Return the list to which the names of launched kernels are added."""
    names, run = [], InterpretedFunction.__getitem__
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda kernel, grid: names.append(kernel.fn.__name__) or run(kernel, grid)
    )
    return names


@contextmanager
def in_any_order(seed):
    """Run the programs of each grid in a random order."""
    set_grid_idx, shuffle = InterpreterBuilder.set_grid_idx, random.Random(seed).sample

    def turned(builder, *index):
        if not any(index):
            programs = list(itertools.product(*map(range, builder.grid_dim)))
            builder.order = iter(shuffle(programs, len(programs)))
        set_grid_idx(builder, *next(builder.order))

    with patch.object(InterpreterBuilder, "set_grid_idx", turned):
        yield


@pytest.mark.parametrize(("block", "heads"), [(1, (4, 2)), (4, (4, 2)), (16, (4, 1))])
@pytest.mark.parametrize("options", [{}, {"window": 37, "softcap": 5.0}])
def test_the_last_split_combines(block, heads, options, launched):
    """One launch is enough, its bits do not depend on which split is last, and the counters are zero afterwards."""
    arguments = problem(block, heads, lengths=(block, 77))
    assert_same(arguments, **options)
    assert launched == ["attend_kernel", "combine_kernel"]
    expected = interpreted(*arguments, **options)
    arrivals = torch.zeros(64, dtype=torch.int32)
    forwards = [interpreted(*arguments, **options, arrivals=arrivals)]
    for seed in range(2):
        with in_any_order(seed):
            forwards.append(interpreted(*arguments, **options, arrivals=arrivals))
    assert launched == ["attend_kernel", "combine_kernel"] * 2 + ["attend_kernel"] * 3
    torch.testing.assert_close(forwards[0], expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(forwards[0], each) for each in forwards)
    assert not arrivals.any()


@pytest.mark.parametrize(("width", "lengths", "capacity"), [(16, (140, 3), 144), (300, (3, 75), 80), (512, (75,), 80)])
def test_widths_and_splits_of_the_last_one(width, lengths, capacity, launched):
    """The last split averages more splits than it reads at once, also for widths where it reads one at a time."""
    arguments = problem(5, (4, 2), (16, width), lengths=[max(5, each) for each in lengths], capacity=capacity)
    got = interpreted(*arguments, arrivals=torch.zeros(64, dtype=torch.int32))
    assert launched == ["attend_kernel"]
    exact = (tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments)
    expected = ragged_attention_reference(*exact, scale=0.3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_programs_count_each_on_their_own():
    """There is a counter for each row, tile and head. A tensor of fewer counters is not used."""
    arguments = problem(16, (8, 2), lengths=(16, 77))  # two rows of two heads, 64 rows each: four tiles of 16
    enough, few = torch.zeros(16, dtype=torch.int32), torch.ones(15, dtype=torch.int32)
    expected = interpreted(*arguments)
    torch.testing.assert_close(interpreted(*arguments, arrivals=enough), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(interpreted(*arguments, arrivals=few), expected)
    assert not enough.any()
    assert few.all()


def test_prefill_is_combined_by_a_second_launch(launched):
    """A second launch costs prefill nothing, and saves registers in the first kernel."""
    assert_same(problem(37, (2, 1), lengths=(77,)), arrivals=torch.zeros(64, dtype=torch.int32))
    assert launched == ["attend_kernel", "combine_kernel"]


@pytest.mark.parametrize(("hip", "device"), [("6.4", "cuda"), (None, "xpu")])
def test_where_a_barrier_orders_no_stores(hip, device, monkeypatch):
    assert kernels.ordered(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert not kernels.ordered(torch.device(device))


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 37, "softcap": 5.0}, {"limit": 77}])
@pytest.mark.parametrize("chunk", [16, 256])
def test_prefill(options, chunk, monkeypatch):
    """No query, some queries or all queries of a tile see an entry. The last tile ends within the block."""
    monkeypatch.setattr(plans, "CHUNK", chunk)
    assert_same(problem(37, (2, 1), lengths=(37, 77) if chunk > 16 else (77,)), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [2, 20])
def test_dtypes(block, dtype):
    assert_same(problem(block, lengths=(20, 60), dtype=dtype))


@pytest.mark.parametrize("widths", [(80, 96), (96, 80), (5, 3), (32, 300)])
def test_widths(widths):
    assert_same(problem(2, widths=widths, lengths=(2, 40)))


@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (20, 1)])
def test_heads(heads):
    assert_same(problem(3, heads=heads, lengths=(3, 40)))


@pytest.mark.parametrize("window", [None, 20])
def test_positions_in_any_order(window):
    """The positions of a block's tokens are not consecutive, and farther apart than the plan expects."""
    query, keys, values, slots, _ = problem(3)
    positions = torch.tensor([[5, 71, 30], [0, 0, 44]])
    assert_same((query, keys, values, slots, positions), window=window)


def test_strides():
    """Caches are views of [S, C, H, D] or of every second entry, and a query is a view of a larger tensor."""
    query, keys, values, slots, positions = problem(2)
    keys, values = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values))
    wide = torch.cat([query, query], -1)[..., 5:21]
    expected = attention(wide.contiguous(), keys.contiguous(), values, slots, positions, 0.3, None, None, None)
    spread = torch.stack([keys, keys * 0 + torch.nan], 3).flatten(2, 3)[:, :, ::2]
    got = attention(wide, spread, values, slots, positions, 0.3, None, None, None)
    assert torch.equal(got, expected)
    assert_same((wide.contiguous(), keys.contiguous(), values, slots, positions))


@pytest.mark.parametrize("block", [1, 5, 20])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("cache", "garbage"), [("keys", torch.nan), ("values", torch.nan), ("values", torch.inf)])
def test_garbage_that_a_query_does_not_see(block, window, cache, garbage):
    """Garbage changes no bit of a query that does not see it, even if a neighbour in the block sees it and changes."""
    query, keys, values, slots, positions = problem(block, (2, 1), lengths=(60,) if block > 1 else (1, 60))
    clean = interpreted(query, keys, values, slots, positions, window=window)
    token = block // 2
    for n, slot in enumerate(slots.tolist()):
        last = int(positions[n, token])
        unseen = torch.arange(80) > last
        if window is not None:
            unseen |= torch.arange(80) <= last - window
        (keys if cache == "keys" else values)[slot, :, unseen] = garbage
    dirty = interpreted(query, keys, values, slots, positions, window=window)
    assert torch.equal(dirty[:, token], clean[:, token])
    assert not dirty[:, token + 1 :].isfinite().any()


def test_no_rows_and_no_queries():
    query, keys, values, slots, positions = problem(2)
    assert interpreted(query[:0], keys, values, slots[:0], positions[:0]).shape == (0, 2, 4, 16)
    assert interpreted(query[:, :, :0], keys, values, slots, positions[:, :0]).shape == (2, 0, 4, 16)


def test_other_dtypes_are_left_to_the_reference():
    arguments = problem()
    doubles = [tensor.double() for tensor in arguments[:3]]
    assert attention(*doubles, *arguments[3:], 0.3, None, None, None) is None
    assert append(*doubles[1:], doubles[1][:2, :, :1], doubles[2][:2, :, :1], *arguments[3:]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "widths"), [(1, (16, 16)), (3, (80, 5))])
def test_append(block, widths, dtype):
    _, keys, values, slots, positions = problem(block, widths=widths, dtype=dtype)
    new = [torch.randn(2, block, 2, width).to(dtype).transpose(1, 2) for width in widths]
    wanted = [keys.clone(), values.clone()]
    ragged_append_reference(*wanted, *new, slots, positions)
    with between_canaries() as canaries:
        caches = [canaries.embed(keys).transpose(1, 2).contiguous().transpose(1, 2), canaries.embed(values)]
        assert append(*caches, *new, slots, positions)
    assert all(torch.equal(found, expected) for found, expected in zip(caches, wanted, strict=True))
