"""The Triton kernels of arm_logps under TRITON_INTERPRET=1. test_triton.py runs them in a new process."""

import sys

import pytest
import torch
from interpreter import between_canaries, no_reads

from genarm_fast.kernels import _dispatch, arm_logps_reference
from genarm_fast.kernels.arm_logps import IGNORE, streamed
from genarm_fast.kernels.arm_logps.tiles import Layer
from genarm_fast.kernels.arm_logps.triton import TILES, launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}  # bfloat16: the interpreter truncates
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 2.0},
    "all": {"bias": True, "logit_scale": 3.0, "softcap": 5.0},
}
kernels = sys.modules["genarm_fast.kernels.arm_logps.triton"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Cut 8 tokens and 101 vocabulary entries into blocks of 5 x 40, and keep three of them.

    The kernels take 32 columns (absorb) and 16 columns (slopes) at a time.
    """
    monkeypatch.setitem(streamed.BLOCK, "cpu", (5, 40))
    monkeypatch.setitem(streamed.KEPT_ELEMENTS, "cpu", 3 * 5 * 40)
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(kernels, "SLOPES_BLOCK", 16)


def inputs(dtype, vocab=101, width=24):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (3, 4), generator=generator)
    labels[0, :2] = labels[-1, 2:] = IGNORE
    labels[1, :4] = torch.tensor([0, vocab - 1, 39, 40])  # the ends of tiles
    return hidden, weight, labels, torch.linspace(-1, 1, vocab).to(dtype).requires_grad_()


def interpreted(hidden, weight, labels, bias=None, logit_scale=1.0, softcap=None):
    """Run the forward pass between canaries, and return the labelled tokens' log-probabilities, differentiable."""
    labelled = labels != IGNORE
    with between_canaries(masks=True) as canaries:
        placed = None if bias is None else canaries.embed(bias.detach()).requires_grad_(bias.requires_grad)
        layer = Layer(placed, logit_scale, softcap)
        return streamed.target_logps(hidden[labelled], weight, labels[labelled], layer, TILES), placed


CASES = [(torch.float32, "all", name) for name in VARIANTS]
CASES += [(dtype, trained, "all") for dtype in TOLERANCE for trained in ("hidden", "layer")]


@pytest.mark.parametrize(("dtype", "trained", "variant"), CASES)
def test_values_and_gradients(dtype, trained, variant):
    """Values and gradients agree with float64 and autograd, for gains of both signs."""
    options = VARIANTS[variant]
    hidden, weight, labels, bias = inputs(dtype)
    hidden.requires_grad_(trained != "layer")
    weight.requires_grad_(trained != "hidden")
    bias = bias.requires_grad_(trained != "hidden") if options.get("bias") else None
    options = {key: value for key, value in options.items() if key != "bias"}
    found, placed = interpreted(hidden, weight, labels, bias, **options)
    assert found.dtype == torch.float32
    gains = torch.linspace(-2, 1, len(found))
    tensors = [x for x in (hidden, weight, placed) if x is not None and x.requires_grad]
    with between_canaries(masks=True):
        gradients = torch.autograd.grad(found, tensors, gains)
    exact = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)]
    wanted = arm_logps_reference(*exact[:2], labels, bias=exact[2], return_tokens=True, **options)[labels != IGNORE]
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    expected = torch.autograd.grad(wanted, [x for x in exact if x is not None and x.requires_grad], gains.double())
    for ours, theirs, tensor in zip(gradients, expected, tensors, strict=True):
        assert ours.dtype == tensor.dtype
        scale = 1 + theirs.abs().max()
        torch.testing.assert_close(ours.double() / scale, theirs / scale, **tolerance)


def test_confident_label_in_half_precision():
    """For a label of π = .998, the rounding of a tile's weights does not swallow its gradient of .013."""
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        hidden = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
        weight, labels = torch.tensor([[8.0], [0.0], [1.0], [0.5]], dtype=dtype), torch.tensor([[0]])
        run = launch if dtype == torch.bfloat16 else lambda h, w, y, *_: arm_logps_reference(h, w, y)
        run(hidden, weight, labels, None, 1.0, None).sum().backward()
        grads.append(hidden.grad.item())
    assert grads[0] == pytest.approx(grads[1], rel=0.02)


def test_masked_vocabulary():
    """A bias of −inf masks tokens, all of the first block among them."""
    hidden, weight, labels, bias = inputs(torch.float32)
    labels[labels != IGNORE] = labels[labels != IGNORE].clamp(min=45, max=90)
    bias = bias.detach()
    bias[:41] = bias[95:] = -torch.inf
    found, _ = interpreted(hidden, weight, labels, bias)
    wanted = arm_logps_reference(hidden, weight, labels, bias=bias, return_tokens=True)[labels != IGNORE]
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_extreme_logits():
    """Logits of ±1e4 neither overflow nor lose the label's log-probability. A NaN stays in its row."""
    hidden = torch.tensor([[[1e4], [-1e4], [torch.nan]]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    logps = launch(hidden, weight, torch.tensor([[0, 0, 0]]), None, 1.0, None)
    assert logps[0, :2].tolist() == [0.0, -2e4]
    assert logps[0, 2].isnan()
    logps[0, :2].sum().backward()
    assert hidden.grad[0, :2].tolist() == [[0.0], [2.0]]


def test_kept_logits_serve_twice():
    """A second backward pass finds the kept logits unchanged: nothing is written over them."""
    hidden, weight, labels, bias = inputs(torch.float32)
    found, placed = interpreted(hidden, weight, labels, bias)
    first, second = (torch.autograd.grad(found.sum(), (weight, placed), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_left_to_pytorch():
    hidden, weight, labels, _ = inputs(torch.float64)
    assert launch(hidden, weight, labels, None, 1.0, None) is None
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 101\), got 101..101"):
        launch(hidden.float(), weight, torch.full_like(labels, 101), None, 1.0, None)
    empty = launch(hidden.float(), weight.float(), torch.full_like(labels, IGNORE), None, 1.0, None)
    assert empty.count_nonzero() == 0
    empty.sum().backward()
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("trained", ["hidden", "layer"])
def test_labels_on_a_gpu_are_not_read(trained, monkeypatch):
    """Ignored positions give 0 and have no gradient. Leaving them out would need their number on the host."""
    hidden, weight, labels, _ = inputs(torch.float32)
    hidden.requires_grad_(trained != "layer")
    weight.requires_grad_(trained != "hidden")
    with no_reads(), monkeypatch.context() as patch:
        patch.setattr(_dispatch, "GPUS", ("cpu",))
        found = launch(hidden, weight, labels, None, 1.0, None)
    gains = torch.linspace(-2, 1, labels.numel()).view(labels.shape)
    inputs_of = [each for each in (hidden, weight) if each.requires_grad]
    expected = arm_logps_reference(hidden, weight, labels, return_tokens=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found[labels == IGNORE].any()
    pairs = zip(*(torch.autograd.grad(each, inputs_of, gains) for each in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", [-1, 101])
def test_a_label_outside_fails_an_assertion_of_the_device(label, monkeypatch):
    hidden, weight, labels, _ = inputs(torch.float32)
    labels[1, 1] = label
    monkeypatch.setattr(_dispatch, "GPUS", ("cpu",))
    with pytest.raises(RuntimeError, match=r"labels must be -100 or in \[0, 101\)"):
        launch(hidden, weight, labels, None, 1.0, None)
