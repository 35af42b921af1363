"""Attention's Triton kernels on a CUDA device agree with the reference on the CPU."""

import pytest
import torch

from genarm_fast.kernels import ragged_append, ragged_append_reference, ragged_attention, ragged_attention_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def problem(block, heads, widths, dtype, capacity=3000):
    generator = torch.Generator().manual_seed(block)
    query = torch.randn(3, block, heads[0], widths[0], generator=generator).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(4, heads[1], capacity, width, generator=generator).to(dtype) for width in widths)
    positions = torch.tensor([[0], [500], [capacity - block]]) + torch.arange(block)
    for slot, last in zip((3, 0, 1), positions[:, -1].tolist()):
        keys[slot, :, last + 1 :] = values[slot, :, last + 1 :] = torch.nan
    return query, keys, values, torch.tensor([3, 0, 1]), positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 1000}, {"softcap": 30.0}])
@pytest.mark.parametrize("block", [1, 4, 16, 200])
@pytest.mark.parametrize(("heads", "widths"), [((32, 8), (128, 128)), ((4, 4), (80, 96)), ((8, 4), (256, 256))])
def test_attention(heads, widths, block, options, dtype):
    arguments = problem(block, heads, widths, dtype)
    got = ragged_attention(*(tensor.cuda() for tensor in arguments), scale=0.1, **options)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    expected = ragged_attention_reference(*exact, scale=0.1, **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_a_graph_follows_positions_without_a_sync():
    query, keys, values, slots, positions = (tensor.cuda() for tensor in problem(2, (8, 2), (64, 64), torch.float32))
    new = query[:, :2] + 1
    options = {"scale": 0.2, "limit": 3000}
    ragged_append(keys, values, new, new, slots, positions)  # compiles
    ragged_attention(query, keys, values, slots, positions, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ragged_append(keys, values, new, new, slots, positions)
            out = ragged_attention(query, keys, values, slots, positions, **options)
        positions -= 5
        positions.clamp_(min=0)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    caches = [cache.cpu() for cache in (keys, values)]
    ragged_append_reference(*caches, new.cpu(), new.cpu(), slots.cpu(), positions.cpu())
    expected = ragged_attention_reference(query.cpu(), *caches, slots.cpu(), positions.cpu(), **options)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)
