"""guided_sample's Triton kernels on a CUDA device agree with the reference on the CPU."""

import math

import pytest
import torch

from genarm_fast.kernels import guided_sample, guided_sample_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCABS = [1, 2, 17, 999, 1024, 1025, 32001, 50257, 128256, 151936]
CYCLE = [torch.bfloat16, torch.float32, torch.float16]


def members(rows, vocab, arms, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(rows, vocab + 8 * i, generator=generator)).to(CYCLE[i % 3]) for i in range(arms + 1)]


def cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def assert_same(logits, weights, **options):
    base, *arms = logits
    moved = {name: cuda(value) for name, value in options.items()}
    got = guided_sample(base.cuda(), [arm.cuda() for arm in arms], cuda(weights), **moved)
    expected = guided_sample_reference(base, arms, weights, **options)
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.status.tolist() == expected.status.tolist()
    for name in ("logprobs", "member_logprobs", "top_logprobs"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(
                getattr(got, name).cpu(), getattr(expected, name), rtol=1e-5, atol=2e-5, equal_nan=True, msg=name
            )


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("arms", [0, 1, 3])
def test_tokens_are_the_reference_s(vocab, arms):
    options = {"temperature": torch.linspace(0, 1.5, 8), "seeds": torch.arange(8) * 10**15, "positions": 7}
    assert_same(
        members(8, vocab, arms), torch.linspace(-0.5, 1, 8 * arms).reshape(8, arms), return_logprobs=True, **options
    )


@pytest.mark.parametrize("vocab", [1025, 50257, 128256])
def test_filters(vocab):
    filters = {
        "top_k": torch.tensor([0, 1, 7, 1500, 40, 0]),
        "top_p": torch.tensor([0.9, 1.0, 0.5, 0.99, 1.0, 0.0]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.0, 1.0, 0.02]),
    }
    assert_same(members(6, vocab, 1), [1.0], seeds=3, positions=torch.arange(6), top_logprobs=4, **filters)


def test_failing_rows():
    base, arm = (z.float() for z in members(4, 1500, 1))
    base[0] = -math.inf
    base[1, 1400], arm[2, 0] = math.nan, math.inf
    assert_same([base, arm], [-0.5], seeds=1, positions=3, return_logprobs=True)


def test_graph_replay_draws_fresh_noise_without_a_sync():
    base = torch.zeros(4, 128256, dtype=torch.bfloat16, device="cuda")
    weights = torch.zeros(0, device="cuda")
    seeds, positions = torch.arange(4, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    options = {"seeds": seeds, "positions": positions, "temperature": torch.ones(4, device="cuda")}
    guided_sample(base, (), weights, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = guided_sample(base, (), weights, **options)
        drawn = []
        for _ in range(3):
            graph.replay()
            drawn.append(out.tokens.clone())
            positions += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for position, tokens in enumerate(drawn):
        expected = guided_sample_reference(base.cpu(), (), [], seeds=seeds.cpu(), positions=position)
        assert tokens.tolist() == expected.tokens.tolist()
