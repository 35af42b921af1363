"""arm_logps agrees with full logits in values and gradients, and needs less memory."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genarm_fast.kernels import arm_logps, arm_logps_reference
from genarm_fast.kernels.arm_logps import IGNORE, streamed
from genarm_fast.kernels.arm_logps.streamed import BLOCK, KEPT_ELEMENTS

VARIANTS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 2.0},
    "both": {"logit_scale": 3.0, "softcap": 5.0},
}


def inputs(
    n: int = 3, t: int = 5, h: int = 4, v: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, t, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n, t), generator=generator)
    labels[0, :2] = labels[-1] = IGNORE
    return hidden, weight, labels


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut 8 tokens and a vocabulary of 11 into nine blocks of 3 x 4, the last ones smaller, and keep five of them."""
    monkeypatch.setitem(BLOCK, "cpu", (3, 4))
    monkeypatch.setitem(KEPT_ELEMENTS, "cpu", 60)


def test_hand_worked() -> None:
    """For two tokens of odds 3:1, π(0) = 3/4. The other position is ignored."""
    weight = torch.tensor([[3.0], [1.0]]).log()
    sums = arm_logps(torch.ones(1, 2, 1), weight, torch.tensor([[0, IGNORE]]))
    assert sums.tolist() == pytest.approx([torch.tensor(0.75).log().item()])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("return_tokens", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_equals_reference(options: dict[str, Any], bias: bool, return_tokens: bool) -> None:
    hidden, weight, labels = inputs()
    b = torch.linspace(-1, 1, 11, dtype=torch.float64) if bias else None
    options = {**options, "bias": b, "return_tokens": return_tokens}
    found, wanted = arm_logps(hidden, weight, labels, **options), arm_logps_reference(hidden, weight, labels, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found[-1].count_nonzero() == 0


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "both", "all"])
@pytest.mark.usefixtures("small_blocks")
def test_gradients(options: dict[str, Any], trained: str) -> None:
    """Gradients agree with finite differences and the reference.

    The output layer is frozen or trained, and logits are kept or computed again.
    """
    hidden, weight, labels = inputs()
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_(trained == "all")
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    tensors = [x for x in (hidden, weight, bias) if x.requires_grad]

    def run(function: Callable[..., Tensor], *_: Tensor) -> Tensor:
        return function(hidden, weight, labels, bias=bias, **options)

    assert torch.autograd.gradcheck(lambda *args: run(arm_logps, *args), tensors)
    g = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    found = torch.autograd.grad(run(arm_logps), tensors, g)
    wanted = torch.autograd.grad(run(arm_logps_reference), tensors, g)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block", [(3, 4), (8, 200), (1 << 20, 1 << 20)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_precisions(
    dtype: torch.dtype, tolerance: float, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are in float32, and gradients in the dtype of their tensor. Both are near float64."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    hidden, weight, labels = inputs(2, 7, 32, 501, dtype)
    sums = arm_logps(hidden, weight, labels)
    assert sums.dtype == torch.float32
    sums.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = arm_logps_reference(*exact, labels)
    wanted.sum().backward()
    torch.testing.assert_close(sums.double(), wanted, rtol=tolerance / 4, atol=tolerance)
    for low, high in zip((hidden, weight), exact):
        assert low.grad is not None
        assert high.grad is not None
        assert low.grad.dtype == dtype
        torch.testing.assert_close(low.grad.double(), high.grad, rtol=tolerance, atol=tolerance)


def test_confident_label_in_bfloat16() -> None:
    """For a label of π = .998, which bfloat16 rounds to 1, the gradient of .013 is still right."""
    grads = []
    for function, dtype in ((arm_logps, torch.bfloat16), (arm_logps_reference, torch.float64)):
        hidden = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
        weight = torch.tensor([[8.0], [0.0], [1.0], [0.5]], dtype=dtype)
        function(hidden, weight, torch.tensor([[0]])).sum().backward()
        assert hidden.grad is not None
        grads.append(hidden.grad.item())
    assert grads[0] == pytest.approx(grads[1], rel=0.01)


@pytest.mark.usefixtures("small_blocks")
def test_autocast_changes_nothing() -> None:
    hidden, weight, labels = inputs(dtype=torch.float32)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sums = arm_logps(hidden, weight, labels)
            found.append((sums, *torch.autograd.grad(sums.sum(), (hidden, weight))))
    for inside, outside in zip(*found):
        assert torch.equal(inside, outside)


@pytest.mark.usefixtures("small_blocks")
def test_masked_vocabulary() -> None:
    """A bias of −inf masks tokens, here all of the first and of the last block too."""
    hidden, weight, labels = inputs()
    labels[labels != IGNORE] %= 4
    labels[labels != IGNORE] += 4
    bias = torch.zeros(11, dtype=torch.float64)
    bias[:4] = bias[6] = bias[8:] = -torch.inf
    labels[labels == 6] = 4
    found, wanted = (
        torch.autograd.grad(f(hidden, weight, labels, bias=bias).sum(), (hidden, weight))
        for f in (arm_logps, arm_logps_reference)
    )
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block", [(2, 3), (1, 1)])
def test_extreme_logits(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of ±1e4 neither overflow nor lose the label's log-probability, whichever block has the highest logit."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    hidden = torch.tensor([[[1e4], [-1e4]]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    logps = arm_logps(hidden, weight, torch.tensor([[0, 0]]), return_tokens=True)
    assert logps.tolist() == [[0.0, -2e4]]
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[[0.0], [2.0]]]


def test_no_labels_and_no_grad() -> None:
    hidden, weight, labels = inputs()
    sums = arm_logps(hidden, weight, torch.full_like(labels, IGNORE))
    assert sums.tolist() == [0.0] * 3
    sums.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0
    with torch.no_grad():
        assert not arm_logps(hidden, weight, labels).requires_grad


@pytest.mark.usefixtures("small_blocks")
def test_kept_logits_serve_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backward pass finds the kept logits unchanged. Only the logits of four blocks in nine are recomputed."""
    computed = 0

    def count(*args: Any) -> None:
        nonlocal computed
        computed += 1
        compute(*args)

    module = sys.modules["genarm_fast.kernels.arm_logps.tiles"].PyTorchTiles
    compute = module.logits_
    monkeypatch.setattr(module, "logits_", count)
    hidden, weight, labels = inputs()
    sums = arm_logps(hidden, weight, labels)
    assert computed == 9
    first, second = (torch.autograd.grad(sums.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert computed == 9 + 2 * 4


class PeakMemory(TorchDispatchMode):
    """Measures the peak of bytes in tensors that were made in this mode and were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (pointer := tensor.untyped_storage()._cdata) not in self.known:
                size = tensor.untyped_storage().nbytes()
                self.known.add(pointer)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(tensor.untyped_storage(), self._free, pointer, size)
        return out

    def _free(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.alive -= size


@pytest.mark.parametrize("train_weight", [False, True])
def test_peak_memory(monkeypatch: pytest.MonkeyPatch, train_weight: bool) -> None:
    """Logits [N, T, V] are never in memory: for [4, 256, 4096] forward and backward need at most an eighth of them."""
    monkeypatch.setitem(BLOCK, "cpu", (256, 128))
    monkeypatch.setitem(KEPT_ELEMENTS, "cpu", 1 << 16)
    hidden, weight, labels = inputs(4, 256, 8, 4096, torch.float32)
    weight.requires_grad_(train_weight)
    peaks = []
    for function in (arm_logps, arm_logps_reference):
        with PeakMemory() as memory:
            function(hidden, weight, labels).sum().backward()
        peaks.append(memory.peak)
    full = 4 * 256 * 4096 * 4
    assert peaks[1] > 2 * full, "the meter must see the full version's logits"
    assert peaks[0] < full / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, r"labels must be \[N, T\].*\(3, 4\)"),
        ({"weight": torch.zeros(11, 5)}, r"weight must be \[V, 4\].*\(11, 5\)"),
        ({"labels": torch.full((3, 5), 11)}, r"in \[0, 11\), got 11..11"),
        ({"labels": torch.full((3, 5), -1)}, r"in \[0, 11\), got -1..-1"),
        ({"labels": torch.zeros(3, 5)}, "labels must be int64, got torch.float32"),
        ({"labels": torch.zeros(3, 5, dtype=torch.bool)}, "labels must be int64, got torch.bool"),
        ({"bias": torch.zeros(1)}, r"bias must be \[11\].*got \(1,\)"),
        ({"weight": torch.zeros(11, 4, device="meta")}, "weight must be on cpu, where hidden is, got meta"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0, or None, got 0.0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    hidden, weight, labels = inputs(dtype=torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        arm_logps(**{"hidden": hidden, "weight": weight, "labels": labels, **change})


def test_labels_of_the_host_say_what_is_multiplied(monkeypatch):
    """With labels on the host and other tensors on a device, only three of six positions, the labelled ones, count."""
    rows = []
    monkeypatch.setattr(streamed, "target_logps", lambda *given: rows.append(given[0].shape) or given[0][:, 0])
    hidden, weight = torch.zeros(2, 3, 8, device="meta"), torch.zeros(11, 8, device="meta")
    labels = torch.tensor([[3, -100, 10], [-100, -100, 0]])
    found = arm_logps(hidden, weight, labels, return_tokens=True)
    assert (found.shape, found.device.type) == (labels.shape, "meta")
    assert rows == [(3, 8)]
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 11\), got 3..12"):
        arm_logps(hidden, weight, torch.tensor([[3, -100, 12], [-100, -100, -100]]))
