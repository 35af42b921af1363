"""ngram_lookup's Triton kernel on a CUDA device agrees with the reference on the CPU."""

import pytest
import torch

from genarm_fast.kernels import ngram_lookup, ngram_lookup_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_ngram_lookup():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (64, 5000), generator=generator)
    lengths = torch.randint(0, 5001, (64,), generator=generator)
    found = ngram_lookup(tokens.cuda(), lengths.cuda(), 7)
    assert torch.equal(found.cpu(), ngram_lookup_reference(tokens, lengths, 7))
