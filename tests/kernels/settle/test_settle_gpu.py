"""settle's Triton kernel on a CUDA device agrees with the reference on the CPU."""

import pytest
import torch

from genarm_fast.kernels import settle, settle_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_settle():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 12, (200, 6), generator=generator)
    arguments = {
        "targets": targets,
        "drafts": torch.where(torch.rand(200, 5, generator=generator) < 0.2, 50, targets[:, :-1]),
        "draft_counts": torch.randint(0, 6, (200,), generator=generator),
        "lengths": torch.zeros(200, dtype=torch.int64),
        "limits": torch.randint(0, 9, (200,), generator=generator),
        "finished": torch.rand(200, generator=generator) < 0.1,
        "stop_ids": torch.tensor([3, -1]),
    }
    found = settle(**{name: value.cuda() for name, value in arguments.items()})
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, settle_reference(**arguments), strict=True))
