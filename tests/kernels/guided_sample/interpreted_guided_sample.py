"""guided_sample's Triton kernels under TRITON_INTERPRET=1. test_triton.py runs them in a new process."""

import math
import sys
from unittest.mock import patch

import pytest
import torch
from canaries import Canaries
from torch.utils._python_dispatch import TorchDispatchMode

from genarm_fast.kernels import guided_sample_reference
from genarm_fast.kernels.guided_sample.arguments import SamplingArguments, check
from genarm_fast.kernels.guided_sample.triton import launch

triton_kernels = sys.modules["genarm_fast.kernels.guided_sample.triton"]

CYCLE = [torch.float32, torch.bfloat16, torch.float16]


def interpreted(base, arms, weights, **options):
    arguments = SamplingArguments(base, arms, weights, **options)
    check(arguments)
    canaries = Canaries()
    base, *arms = (canaries.embed(logits) if logits.is_contiguous() else logits for logits in (base, *arms))
    with patch.object(torch, "empty", canaries.allocate):
        drawn = launch(arguments._replace(base_logits=base, arm_logits=arms))
    assert canaries.untouched()
    return drawn


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
    """Filters keep few or most tokens of many tiles, with top-k above and below the number of groups.

    The temperature is so high that tokens near the threshold are drawn.
    """
    options = {"temperature": 9.0, "positions": torch.arange(2), "top_k": top_k, "top_p": top_p}
    assert_same(members((2,), 9500, 1), [1.0], seeds=3, top_logprobs=2, **options)


@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_filters_together(min_p):
    """top-p is a share of the mass that top-k keeps, and min-p comes last. In these rows few tokens have most mass."""
    base = members((1,), 300, 0)[0].expand(24, 300).contiguous()
    filters = {"top_k": 30, "top_p": 0.8, "min_p": min_p}
    assert_same([base], [], temperature=1.0, seeds=torch.arange(24), positions=3, **filters)


def test_blocks_strides_and_bias():
    base, arm = members((2, 3), 1300, 1)
    wide = torch.randn(3, 2, 2600)[:, :, 100:1400].transpose(0, 1)  # [2, 3, 1300]; rows have the smaller stride
    options = {"seeds": torch.arange(4)[::2], "positions": torch.arange(6).view(3, 2).T, "vocab_size": 1290}
    temperature = torch.tensor([0.9, 0.0])
    bias = torch.randn(2, 1300)
    assert_same(
        [base, arm, wide], torch.randn(2, 2), temperature=temperature, logit_bias=bias, top_logprobs=2, **options
    )


@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.9}])
def test_a_bias_of_minus_infinity(filters):
    """Each row's bias masks single tokens, whole tiles or the first part of a tile, at every position."""
    bias = torch.randn(2, 2500, generator=torch.Generator().manual_seed(5))
    bias[0, 1024:2048], bias[1, :700], bias[1, ::2] = -math.inf, -math.inf, -math.inf
    options = {"seeds": torch.arange(2), "positions": torch.arange(6).view(2, 3), "temperature": 2.0}
    logits = [z.float() for z in members((2, 3), 2500, 1)]
    assert_same(logits, [0.5], logit_bias=bias, return_logprobs=True, **options, **filters)
    drawn = interpreted(logits[0], logits[1:], [0.5], logit_bias=bias, **options, **filters)
    assert bias.gather(1, drawn.tokens).isfinite().all()


PLAIN = ["scores_kernel", "draw_kernel"]
FILTERED = ["scores_kernel", "bound_kernel", "collect_kernel", "draw_kernel"]


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 5}, {"min_p": torch.zeros(2)}, {"top_p": torch.ones(2)}],
)
@pytest.mark.parametrize("numbers", [False, True])
def test_launches(filters, numbers, monkeypatch):
    """A call launches two kernels, or four with filters, and nothing else. Numbers are not copied to the device."""
    launched = []
    for name in FILTERED:
        monkeypatch.setattr(triton_kernels, name, Recorded(launched, name))
    row = torch.arange(2)
    options = {"seeds": 1, "positions": 2, "temperature": 0.7} if numbers else {"seeds": row, "positions": row}
    logits = torch.zeros(2, 40)
    with Operations() as operations:
        launch(SamplingArguments(logits, (), [], **options, **filters))
    used = filters.get("top_k") or any(isinstance(value, torch.Tensor) for value in filters.values())
    assert launched == (FILTERED if used else PLAIN)
    assert operations.found == {"aten::empty"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func._schema.name)
        return func(*args, **kwargs or {})


class Recorded:
    """Replaces a kernel and records its launches."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getitem__(self, grid):
        return lambda *_, **__: self.log.append(self.name)


@pytest.mark.parametrize("changed", ["base", "arm", "weights", "temperature", "top_p", "min_p", "bias"])
def test_the_negative_bit_counts(changed):
    values = {"base": torch.randn(2, 40), "arm": torch.randn(2, 40), "weights": torch.rand(2, 1)}
    values |= {"temperature": torch.rand(2) + 1, "top_p": torch.rand(2), "min_p": torch.rand(2)}
    values["bias"] = torch.randn(2, 40)
    results = []
    for tensor in (values[changed], torch._neg_view(-values[changed])):
        now = values | {changed: tensor}
        options = {name: now[name] for name in ("temperature", "top_p", "min_p")}
        options |= {"logit_bias": now["bias"], "return_logprobs": True}
        results.append(launch(SamplingArguments(now["base"], (now["arm"],), now["weights"], 1, 0, **options)))
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("arm", [False, True])
def test_other_dtypes_are_left_to_the_reference(arm):
    logits, exact = torch.zeros(2, 30), torch.zeros(2, 30, dtype=torch.float64)
    base, arms = (logits, (exact,)) if arm else (exact, (logits,))
    assert launch(SamplingArguments(base, arms, [1.0], seeds=0, positions=0)) is None


@pytest.mark.parametrize("block", [(), (2,), (0,)])
def test_no_rows(block):
    base = torch.zeros(0, *block, 30)
    drawn = interpreted(base, (base,), torch.zeros(0, 1), seeds=1, positions=0, top_k=5, top_logprobs=2)
    assert drawn.tokens.shape == (0, *block)
    assert drawn.top_logprobs.shape == (0, *block, 2)


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


def test_canaries_catch_reads_out_of_bounds():
    logits = members((2,), 40, 0)
    canaries = Canaries()
    base = canaries.embed(logits[0])
    beyond = torch.as_strided(base, (2, 50), (40, 1), base.storage_offset())  # ten columns more than the logits have
    drawn = launch(SamplingArguments(beyond, (), [], seeds=0, positions=0))
    assert drawn.status.tolist() == [0, 2]
