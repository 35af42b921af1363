"""ngram_lookup agrees with the index of the host's drafter, an independent implementation."""

import random

import pytest
import torch

from genarm_fast.kernels import ngram_lookup, ngram_lookup_reference
from genarm_fast.speculation.ngram_drafter import NgramIndex


def cases(seed):
    """Return rows of few different tokens, so that endings repeat. Tokens beyond a row's length are random too."""
    rng = random.Random(seed)
    width, kinds = rng.randint(1, 60), rng.randint(1, 6)
    rows = [[rng.randint(0, kinds) for _ in range(width)] for _ in range(20)]
    lengths = [rng.randint(0, width) for _ in rows]
    min_n = rng.randint(1, 3)
    return rows, lengths, rng.randint(0, 9), min_n + rng.randint(0, 3), min_n


def expected(rows, lengths, k, max_n, min_n):
    found = [NgramIndex(row[:length], max_n=max_n, min_n=min_n).propose(k) for row, length in zip(rows, lengths)]
    return torch.tensor([line or [-1] * k for line in found]).view(len(rows), k)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("seed", range(30))
def test_values(seed, dtype):
    rows, lengths, k, max_n, min_n = cases(seed)
    tokens, counts = torch.tensor(rows, dtype=dtype), torch.tensor(lengths, dtype=dtype)
    for op in (ngram_lookup, ngram_lookup_reference):
        got = op(tokens, counts, k, max_n=max_n, min_n=min_n)
        assert got.dtype == torch.int64
        assert torch.equal(got, expected(rows, lengths, k, max_n, min_n))


def test_by_hand():
    """The longest ending counts, even if a shorter one stands later. A repetition continues."""
    tokens = torch.tensor(
        [[1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [5, 6, 5, 6, 5, 6, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]
    )
    got = ngram_lookup(tokens, torch.tensor([10, 6, 10]), 3)
    assert got.tolist() == [[9, 2, 3], [5, 6, 5], [-1, -1, -1]]


def test_lengths_at_the_ends_of_int64():
    ends, tokens = torch.iinfo(torch.int64), torch.tensor([[1, 2, 3, 1, 2]]).repeat(4, 1)
    got = ngram_lookup(tokens, torch.tensor([ends.max, 5, -1, ends.min]), 1)
    assert got.tolist() == [[3], [3], [-1], [-1]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_look_at(shape):
    got = ngram_lookup(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], dtype=torch.int64), 2)
    assert got.tolist() == [[-1, -1]] * shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, r"tokens of shape \(4,\): expected \[R, H\]"),
        ({"tokens": torch.zeros(2, 4)}, "tokens of dtype torch.float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths of shape \(3,\): expected \(2,\)"),
        ({"lengths": torch.zeros(2)}, "lengths of dtype torch.float32"),
        ({"lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, "lengths on meta"),
        ({"k": -1}, "k=-1: expected an integer >= 0"),
        ({"min_n": 0}, "min_n=0, max_n=4"),
        ({"max_n": 1}, "min_n=2, max_n=1"),
    ],
)
def test_what_is_refused(change, message):
    given = {"tokens": torch.zeros(2, 4, dtype=torch.int64), "lengths": torch.zeros(2, dtype=torch.int64), "k": 2}
    with pytest.raises((TypeError, ValueError), match=message):
        ngram_lookup(**given | change)
