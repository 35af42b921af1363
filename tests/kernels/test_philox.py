"""The random-number contract: Random123's published vectors, the transform in float64, independence of the streams."""

import math
from pathlib import Path

import pytest
import torch

from genarm_fast.kernels import guided_sample, guided_sample_reference, gumbel, seed_tensor
from genarm_fast.kernels.philox import TILE_LEVEL, TOKEN_LEVEL, philox

# Counter, key and output from Random123 1.14, tests/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    k0, k1 = words(key)
    assert philox(words(counter), (k0, k1)) == words(expected)


def test_counter_and_key_layout():
    seed = torch.tensor(0x0123456789ABCDEF)
    bits = philox((torch.tensor(77), 5, TOKEN_LEVEL, 0), (seed & 0xFFFFFFFF, seed >> 32))[0].item()
    expected = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
    assert gumbel(seed, TOKEN_LEVEL, torch.tensor(5), torch.tensor(77)).item() == pytest.approx(expected, rel=1e-5)


def test_gumbel_matches_float64_in_both_tails():
    index = torch.arange(300_000)
    noise = gumbel(torch.tensor(3), TOKEN_LEVEL, torch.tensor(0), index).double()
    bits = philox((index, 0, TOKEN_LEVEL, 0), (torch.tensor(3), torch.tensor(0)))[0].double()
    u = (bits + 0.5) / 2**32
    exact = -torch.log(-torch.log1p(-u))
    assert exact.max() > 12  # uniforms of 24 bits would not reach this tail
    central = u < 0.999  # nearer to 1, where G is very small, float32 spaces u by 6e-8, too coarse for 1 - u
    torch.testing.assert_close(noise[central], exact[central], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(noise[~central], exact[~central], rtol=0, atol=0.2)
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=5 * 1.2825 / math.sqrt(len(index)))
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), rel=0.01)


def test_extreme_uniforms_stay_finite():
    for bits in (0, 1, 2**32 - 1):  # give the largest and the smallest noise that the contract can produce
        u = min((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)
        assert math.isfinite(-math.log(-math.log1p(-u)))


def test_seeds_use_all_64_bits():
    seeds = seed_tensor([0, 1, 2**32, 2**63, 2**64 - 1])
    assert seeds.dtype == torch.int64
    assert len(set(gumbel(seeds, TILE_LEVEL, torch.tensor(0), torch.tensor(0)).tolist())) == 5
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed {seed}: expected 0..18446744073709551615"):
            seed_tensor([0, seed])


BASE = {"seed": 11, "level": TOKEN_LEVEL, "position": 4, "index": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 12},
        {"seed": 11 + 2**32},
        {"level": TILE_LEVEL},
        {"position": 5},
        {"index": 1},
        {"index": 1024},
        {"seed": 4, "position": 11},
    ],
)
def test_streams_are_independent(change):
    def stream(seed, level, position, index):
        return gumbel(torch.tensor(seed), level, torch.tensor(position), torch.arange(index, index + 100_000))

    def correlation(x, y):
        return torch.corrcoef(torch.stack([x, y]))[0, 1].abs().item()

    one, other = stream(**BASE), stream(**(BASE | change))
    assert correlation(one, other) < 5 / math.sqrt(len(one))
    assert correlation(one.exp().clamp_max(50), other.exp().clamp_max(50)) < 5 / math.sqrt(len(one))  # the tail wins
    assert correlation(one, stream(**BASE)) > 0.999  # control: the same stream


def documented():
    """Return the rows of the last table of docs/rng.md."""
    lines = (Path(__file__).parents[2] / "docs/rng.md").read_text().split("| seed | level |")[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", documented(), ids=lambda row: row[0])
@pytest.mark.parametrize("sample", [guided_sample_reference, guided_sample], ids=["reference", "dispatcher"])
def test_documented_vectors(row, sample):
    seed, level, position, index = map(int, row[:4])
    noise = gumbel(seed_tensor([seed]), level, torch.tensor([position]), torch.tensor([index]))
    assert noise.item() == pytest.approx(float(row[5]), rel=1e-5, abs=1e-5)
    for vocab, token in zip((10, 1500, 50257), row[6:], strict=True):
        logits = 3 * torch.sin(torch.arange(vocab).double())[None].float()
        assert sample(logits, (), [], seeds=seed, positions=position).tokens.item() == int(token)
