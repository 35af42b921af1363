"""arm_logps on a CUDA device agrees with float64 and autograd on the CPU, and needs less memory than full logits."""

import pytest
import torch

from genarm_fast.kernels import arm_logps, arm_logps_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 20.0}])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab", [32768, 50257])
def test_values_and_gradients(vocab, dtype, options):
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(*shape, generator=generator).to(dtype).double() for shape in ((2, 40, 64), (vocab, 64), (vocab,))
    ]
    labels = torch.randint(-1, vocab, (2, 40), generator=generator)
    labels[labels < 0] = labels[0, :5] = -100
    ours = [each.to("cuda", dtype).requires_grad_() for each in exact]
    exact = [each.requires_grad_() for each in exact]
    found = arm_logps(*ours[:2], labels.cuda(), bias=ours[2], **options)
    wanted = arm_logps_reference(*exact[:2], labels, bias=exact[2], **options)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    gradients = [torch.autograd.grad(total.sum(), inputs) for total, inputs in ((found, ours), (wanted, exact))]
    for got, expected in zip(*gradients, strict=True):
        scale = expected.abs().max()
        tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(got.cpu().double() / scale, expected / scale, **tolerance)


def test_memory():
    """A frozen output layer of 128,256 tokens needs an eighth of the memory of full logits, at 4,096 positions."""
    hidden = torch.randn(1, 4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 256, device="cuda", dtype=torch.bfloat16)
    labels, peaks = torch.zeros(1, 4096, dtype=torch.int64, device="cuda"), []
    for function in (arm_logps, arm_logps_reference):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(hidden, weight, labels).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        hidden.grad = None
    assert peaks[0] < peaks[1] / 8
