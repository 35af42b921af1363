"""The Triton kernels under TRITON_INTERPRET=1, run by test_triton.py in a process of its own.

Every buffer lies between canaries: a read outside it meets a NaN, which a row's status reports; a write outside it
changes them. Memory from torch.empty starts as NaN, so that an unwritten element cannot pass for a result.
"""

import math
import os
from unittest.mock import patch

import pytest
import torch

from genarm_fast.kernels import guided_sample_reference, guided_sample_triton, settle_triton
from genarm_fast.kernels._arguments import check_arguments
from genarm_fast.kernels.guided_sample import GuidedSample
from genarm_fast.kernels.settle import settle_reference

assert os.environ.get("TRITON_INTERPRET") == "1"  # set before triton was imported
MARGIN = 2048  # elements; more than a tile
CYCLE = [torch.float32, torch.bfloat16, torch.float16]


class Canaries:
    def __init__(self):
        self.buffers = []

    def allocate(self, *size, dtype=torch.float32, device=None):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        inner = math.prod(size)
        value = math.nan if dtype.is_floating_point else -1234567
        self.buffers.append(torch.full((inner + 2 * MARGIN,), value, dtype=dtype))
        return self.buffers[-1][MARGIN : MARGIN + inner].view(size)

    def embed(self, tensor):
        return self.allocate(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def untouched(self):
        def intact(margin):
            return (
                margin.isnan().all()
                if margin.is_floating_point()
                else (margin == torch.full_like(margin, -1234567)).all()
            )

        return all(intact(buffer[:MARGIN]) and intact(buffer[-MARGIN:]) for buffer in self.buffers)


def interpreted(
    base, arms, weights, *, vocab_size=None, logit_bias=None, return_logprobs=False, top_logprobs=0, **rest
):
    parameters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | rest
    vocab = check_arguments(base, arms, weights, vocab_size, logit_bias, top_logprobs, **parameters)
    canaries = Canaries()
    base, *arms = (canaries.embed(logits) if logits.is_contiguous() else logits for logits in (base, *arms))
    with patch.object(torch, "empty", canaries.allocate):
        fields = guided_sample_triton.guided_sample(
            base, arms, weights, vocab, logit_bias, return_logprobs, top_logprobs, **parameters
        )
    assert canaries.untouched()
    return GuidedSample(*fields)


def assert_same(logits, weights, **options):
    base, *arms = logits
    got = interpreted(base, arms, weights, **options)
    expected = guided_sample_reference(base, arms, weights, **options)
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.status.tolist() == expected.status.tolist()
    for name in ("logprobs", "member_logprobs", "top_logprobs"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(
                getattr(got, name), getattr(expected, name), rtol=2e-6, atol=2e-5, equal_nan=True, msg=name
            )
    if got.top_tokens is not None:
        assert got.top_tokens.tolist() == expected.top_tokens.tolist()


def members(shape, vocab, arms, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(*shape, vocab + 3 * i, generator=generator)).to(CYCLE[i % 3]) for i in range(arms + 1)]


@pytest.mark.parametrize("vocab", [1, 2, 17, 999, 1024, 1025, 32001])
def test_vocabularies(vocab):
    rows = 1 if vocab > 2000 else 3
    options = {"temperature": torch.tensor([0.8, 0.0, 1.5])[:rows], "seeds": torch.arange(rows) - 1, "positions": 7}
    logits = [z.float() for z in members((rows,), vocab, 1)]
    assert_same(logits, [0.7], return_logprobs=True, top_logprobs=min(vocab, 3), **options)


@pytest.mark.parametrize("arms", [0, 1, 3, 8])
def test_numbers_of_arms(arms):
    weights = torch.linspace(-0.5, 1.5, 2 * arms).reshape(2, arms)
    assert_same(members((2,), 1100, arms), weights, seeds=2**63 + 5, positions=torch.arange(2), return_logprobs=True)


@pytest.mark.parametrize("seed", range(3))
def test_filters(seed):
    filters = {
        "top_k": torch.tensor([0, 1, 7, 1500, 40, 0]),
        "top_p": torch.tensor([0.9, 1.0, 0.5, 0.99, 1.0, 0.0]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.0, 1.0, 0.02]),
    }
    logits = [z.float() for z in members((6,), 2100, 1, seed)]
    assert_same(logits, [1.0], temperature=1.7, seeds=seed, positions=torch.arange(6), top_logprobs=4, **filters)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (0, 0.999), (300, 1.0), (6000, 0.5)])
def test_filters_over_many_tiles(top_k, top_p):
    """Candidates from several reads: few, most, bounded by groups of a tile, more than there are groups. So warm that
    tokens near the threshold are drawn."""
    options = {"temperature": 9.0, "positions": torch.arange(2), "top_k": top_k, "top_p": top_p}
    assert_same(members((2,), 9500, 1), [1.0], seeds=3, top_logprobs=2, **options)


def test_blocks_strides_and_bias():
    base, arm = members((2, 3), 1300, 1)
    wide = torch.randn(3, 2, 2600)[:, :, 100:1400].transpose(0, 1)  # [2, 3, 1300], rows closer than positions
    options = {"seeds": torch.arange(4)[::2], "positions": torch.arange(6).view(3, 2).T, "vocab_size": 1290}
    temperature = torch.tensor([0.9, 0.0])
    bias = torch.randn(2, 1300)
    assert_same(
        [base, arm, wide], torch.randn(2, 2), temperature=temperature, logit_bias=bias, top_logprobs=2, **options
    )


def test_masks_and_failing_rows():
    base, arm = (z.float() for z in members((7,), 1500, 1))
    base[0] = -math.inf
    base[1, 1400] = math.nan
    arm[2, 0] = math.inf
    arm[3, 1499], base[3, 7] = math.nan, math.inf
    base[5, 1:] = -math.inf
    arm[6, ::2] = -math.inf
    weights = torch.tensor([[0.5]] * 4 + [[math.nan], [-1.0], [-1.0]])
    assert_same([base, arm], weights, seeds=1, positions=3, return_logprobs=True, top_p=0.9)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("ragged", [False, True])
def test_settle(width, ragged):
    generator = torch.Generator().manual_seed(width)
    targets = torch.randint(0, 12, (40, width), generator=generator)
    wrong = torch.rand(40, width - 1, generator=generator) < 0.2
    lengths = torch.randint(0, 6, (40,), generator=generator)
    arguments = {
        "lengths": lengths,
        "limits": lengths + torch.randint(0, 6, (40,), generator=generator),
        "finished": torch.rand(40, generator=generator) < 0.1,
        "stop_ids": torch.randint(-1, 12, (40, 2), generator=generator) if ragged else torch.tensor([3, 5, -1]),
        "draft_counts": torch.randint(0, width, (40,), generator=generator) if ragged else None,
    }
    drafts = torch.where(wrong, 50, targets[:, :-1])
    canaries = Canaries()
    with patch.object(torch, "empty", canaries.allocate):
        found = settle_triton.settle(canaries.embed(targets), canaries.embed(drafts), **arguments)
    assert canaries.untouched()
    expected = settle_reference(targets, drafts, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_canaries_catch_reads_out_of_bounds():
    logits = members((2,), 40, 0)
    canaries = Canaries()
    base = canaries.embed(logits[0])
    beyond = torch.as_strided(base, (2, 50), (40, 1), base.storage_offset())  # claims ten logits too many
    fields = guided_sample_triton.guided_sample(
        beyond, (), [], 50, None, False, 0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=0, positions=0
    )
    assert fields[1].tolist() == [0, 2]
