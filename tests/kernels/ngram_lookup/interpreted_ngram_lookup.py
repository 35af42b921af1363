"""ngram_lookup's Triton kernel under TRITON_INTERPRET=1. test_triton.py runs it in a new process."""

import pytest
import torch
from interpreter import between_canaries
from test_ngram_lookup import cases

from genarm_fast.kernels import ngram_lookup_reference
from genarm_fast.kernels.ngram_lookup import triton as on_gpu


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("seed", range(8))
def test_values(seed, block, monkeypatch):
    """The kernel's drafts are the reference's, for rows of one block and of several."""
    monkeypatch.setattr(on_gpu, "BLOCK", block)
    rows, lengths, k, max_n, min_n = cases(seed)
    tokens, counts = torch.tensor(rows), torch.tensor(lengths)
    with between_canaries() as canaries:
        got = on_gpu.launch(canaries.embed(tokens), canaries.embed(counts), k, max_n, min_n)
    assert torch.equal(got, ngram_lookup_reference(tokens, counts, k, max_n=max_n, min_n=min_n))


def test_a_length_beyond_the_row_reads_the_row_alone():
    ends, tokens = torch.iinfo(torch.int64), torch.tensor([[1, 2, 3, 1, 2]]).repeat(3, 1)
    with between_canaries() as canaries:
        got = on_gpu.launch(canaries.embed(tokens), torch.tensor([ends.max, 99, ends.min]), 2, 4, 2)
    assert got.tolist() == [[3, 1], [3, 1], [-1, -1]]
