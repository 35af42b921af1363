"""Fixtures that the tests of several ops share."""

from __future__ import annotations

import pytest
import torch

from genarm_fast.kernels import _native

ISAS = _native.core.instruction_sets() if _native.core else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test with each instruction set of the C++ core that this CPU has."""
    _native.core.use(request.param)
    yield request.param
    _native.core.use(ISAS[0])


@pytest.fixture
def threads():
    """Return a function that sets the number of PyTorch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
