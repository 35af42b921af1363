"""Temperatures at which drafts are drawn: a wrong one changes no token, only how many drafts are right."""

import torch

from genarm_fast.engine.step_tensors import SamplingTensors


def sampling(table):
    """Return SamplingTensors with `table` as weights [R, S, 1 + m] and temperatures 1, 2, ..."""
    weights = torch.tensor(table, dtype=torch.float32)
    return SamplingTensors(
        weights, {"temperature": torch.arange(1.0, len(table) + 1), "seeds": torch.zeros(len(table))}
    )


def test_the_sum_of_the_weights_sharpens():
    found = sampling([[[1.0, 1.0]], [[1.0, -0.5]], [[1.0, -1.0]], [[1.0, -3.0]]])
    parameters = found.sharpened(torch.zeros(4, 1, dtype=torch.int64), "stream")
    assert parameters["temperature"].tolist() == [0.5, 4.0, 3.0, 4.0]  # a sum of 0 or less counts as 1
    assert parameters["seeds"] is found.parameters["seeds"]
    assert found.parameters["temperature"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_weights_that_stay_are_summed_once_on_each_stream():
    found, positions = sampling([[[1.0, 1.0]]]), torch.tensor([[3]])
    once = found.sharpened(positions, "one")
    assert found.sharpened(positions + 1, "one") is once
    assert found.sharpened(positions, "other") is not once


def test_weights_of_each_position_are_not_kept():
    found = sampling([[[1.0, 1.0], [1.0, 3.0]]])
    assert [found.sharpened(torch.tensor([[at]]), "stream")["temperature"].item() for at in (0, 1, 7, 0)] == [
        0.5, 0.25, 0.25, 0.5,
    ]  # fmt: skip
