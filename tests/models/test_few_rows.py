"""The choice between cuBLAS and the few-rows kernel for few rows: by a fake clock, once per shape, if the numbers are
right."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, FakeCuda
from tiny_models import build_model
from torch.nn import functional

from genarm_fast.device.base import Device
from genarm_fast.models import fast_modules, few_rows, stacked_decoder, stacking
from genarm_fast.models.weights import Movable


def product(outputs=6, inputs=4, *, bias=False):
    weight = torch.randn(outputs, inputs)
    return SimpleNamespace(weight=weight, bias=torch.randn(outputs) if bias else None, kernel_row_counts=frozenset())


class Clock:
    """A clock for products that take the seconds the test sets. The few-rows kernel is PyTorch's times `wrong`."""

    def __init__(self, monkeypatch):
        self.now, self.cublas, self.own, self.wrong, self.calls = 0.0, lambda rows: 1.0, lambda rows: 1.0, 1.0, []
        linear = functional.linear

        def run(name, x, weight, bias):
            self.calls.append((name, len(x), len(weight)))
            self.now += (self.cublas if name == "cublas" else self.own)(len(x))
            return linear(x, weight, bias) * (self.wrong if name == "ours" else 1)

        monkeypatch.setattr(few_rows, "functional", SimpleNamespace(linear=lambda *given: run("cublas", *given)))
        monkeypatch.setattr(few_rows, "few_rows_linear", lambda *given: run("ours", *given))
        self.device = Device(clock=lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(few_rows, "measured", {})
    return Clock(monkeypatch)


def test_the_faster_one_serves(clock):
    """The few-rows kernel wins from 4 rows on; at 2 rows it gains less than measurements scatter."""
    clock.cublas = lambda rows: 2.0
    clock.own = {1: 3.0, 2: 1.99, 4: 1.0, 8: 1.0, 16: 1.9}.get
    products = [product(), product()]
    said = few_rows.choose(products, clock.device)
    assert [each.kernel_row_counts for each in products] == [frozenset({4, 8, 16})] * 2
    assert said == "of 5 shapes of few rows, cuBLAS multiplies 2 and our kernel 3"
    for rows, expected in ((1, False), (2, False), (3, True), (9, True), (16, True), (17, False)):
        assert few_rows.serves(products[0], torch.zeros(rows, 1, 4)) == expected
    seconds = {shape.rows: found for shape, found in few_rows.measured.items()}
    assert (seconds[8].cublas, seconds[8].few_rows) == (2.0, 1.0)


def test_a_shape_is_measured_once(clock):
    few_rows.choose([product(), product(bias=True), product(outputs=5)], clock.device)
    assert len(few_rows.measured) == 15
    measured = len(clock.calls)
    again = product()
    clock.own = lambda rows: 0.1
    few_rows.choose([again], clock.device)
    assert len(clock.calls) == measured
    assert again.kernel_row_counts == frozenset()  # the first measurement counts


def test_wrong_numbers_are_not_served(clock):
    clock.own, clock.wrong = (lambda rows: 0.1), 1.1
    one = product()
    few_rows.choose([one], clock.device)
    assert one.kernel_row_counts == frozenset()
    assert all("away from cuBLAS" in found.why for found in few_rows.measured.values())


def test_a_kernel_that_fails_is_not_served(clock, monkeypatch):
    def fails(*given):
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(few_rows, "few_rows_linear", fails)
    one = product()
    few_rows.choose([one], clock.device)
    assert one.kernel_row_counts == frozenset()
    assert {found.why for found in few_rows.measured.values()} == {"NotImplementedError: no such instruction"}


def test_running_out_of_memory_is_told(clock, monkeypatch):
    def fails(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(few_rows, "few_rows_linear", fails)
    with pytest.raises(torch.OutOfMemoryError):
        few_rows.choose([product()], clock.device)


def test_no_choice_on_the_cpu():
    assert few_rows.choose([product()]) == ""


def test_on_a_gpu_its_device_measures(clock, monkeypatch):
    """On a GPU its device's clock and graphs measure, without the host's launches. Nothing is measured if a weight is
    elsewhere."""
    made = []
    monkeypatch.setattr(few_rows, "Cuda", lambda: made.append(clock.device) or clock.device)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert few_rows.choose([product()]) == "of 5 shapes of few rows, cuBLAS multiplies 5 and our kernel 0"
    assert len(made) == 1
    elsewhere = SimpleNamespace(weight=SimpleNamespace(is_cuda=False), bias=None, kernel_row_counts=frozenset())
    assert few_rows.choose([product(), elsewhere]) == ""
    assert len(made) == 1


def test_a_decoder_says_what_was_chosen_and_its_trial_proves_it(clock, monkeypatch):
    """The trial finds a kernel that is right when it is measured and wrong later."""
    monkeypatch.setattr(fast_modules, "on_gpu", lambda model: True)
    clock.own = lambda rows: 0.1
    monkeypatch.setattr(stacked_decoder, "choose", lambda products: few_rows.choose(products, clock.device))
    for wrong in (False, True):
        base = build_model("llama", 0)
        scale = 3.0 if wrong else 1.0
        monkeypatch.setattr(stacked_decoder, "few_rows_linear", lambda *given, by=scale: functional.linear(*given) * by)
        forward, how = stacking.stacked_forward(base.model, Movable([base]))
        if wrong:
            assert forward is None
            assert "the stacked one is" in how
        else:
            assert "our kernel 20" in how
            assert all(each.kernel_row_counts == set(few_rows.MEASURED_ROWS) for each in forward.products)


def test_the_launcher_on_a_gpu():
    """A graph can capture it: no CPU tensor, no read, and one launch, or two where inputs are split."""
    with FakeCuda() as fake:
        x, bias = torch.empty(2, 3, 512, dtype=torch.bfloat16, device=CUDA), torch.empty(40, device=CUDA)
        weight = torch.empty(40, 512, dtype=torch.bfloat16, device=CUDA)
        assert few_rows.few_rows_linear(x, weight, bias).shape == (2, 3, 40)
        assert fake.launched == ["few_rows_kernel", "total_kernel"]
        with pytest.raises(ValueError, match="no kernel of few rows"):
            few_rows.few_rows_linear(x.repeat(1, 6, 1), weight, None)
