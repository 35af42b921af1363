"""settle's Triton kernel under TRITON_INTERPRET=1. test_triton.py runs it in a new process."""

from unittest.mock import patch

import pytest
import torch
from canaries import Canaries

from genarm_fast.kernels import settle_reference
from genarm_fast.kernels.settle.triton import launch


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
        found = launch(canaries.embed(targets), canaries.embed(drafts), **arguments)
    assert canaries.untouched()
    expected = settle_reference(targets, drafts, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_lengths_at_the_ends_of_int64_and_no_rows():
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    lengths = torch.tensor([0, high - 2, high, -5, low, low, 5, high])
    limits = torch.tensor([high, high, high, high, high, low + 3, low, low])
    targets = torch.arange(4).repeat(8, 1)
    for rows in (8, 0):
        rest = {"lengths": lengths[:rows], "limits": limits[:rows], "finished": torch.zeros(rows, dtype=torch.bool)}
        rest |= {"stop_ids": torch.tensor([low]), "draft_counts": torch.full((rows,), high)}
        found = launch(targets[:rows], targets[:rows, :3], **rest)
        expected = settle_reference(targets[:rows], targets[:rows, :3], **rest)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
