"""What a verdict of the self-check depends on where there is a GPU; test_selfcheck_records.py has the other keys."""

import torch

from genarm_fast.engine import verdict_key


def test_each_kind_of_gpu_is_checked_by_itself(monkeypatch):
    def on(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        return verdict_key._machine(torch.device("cuda", 0))

    assert on("NVIDIA H100") == on("NVIDIA H100")
    assert on("NVIDIA H100") != on("NVIDIA A100")
