"""Fixtures for tests of several ops."""

from __future__ import annotations

import pytest
import torch

from genarm_fast.kernels import _native

ISAS = _native.core.instruction_sets() if _native.core else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set of the C++ core that runs here, in use until the end of the test."""
    _native.core.use(request.param)
    yield request.param
    _native.core.use(ISAS[0])


@pytest.fixture
def threads():
    """threads(n) sets the number of PyTorch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
