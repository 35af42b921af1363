"""Every Triton launcher takes the tensors of test_values_in_memory.py, placed between canaries.

test_triton.py runs this file.
"""

import pytest
import torch
from every_op import OPS, called, negated, tensors_of, without_rows
from interpreter import between_canaries

KERNELS = [name for name, op in OPS.items() if op.launch is not None]


def launched(name, floats, integers, changed=()):
    """Call the launcher with tensors between canaries. The tensors with an index in `changed` have the negative bit."""
    with between_canaries(masks=name == "arm_logps") as canaries:
        placed = [
            torch._neg_view(canaries.embed(each.neg())) if i in changed else canaries.embed(each)
            for i, each in enumerate(floats)
        ]
        return called(OPS[name].launch, placed, [canaries.embed(each) for each in integers])


def tolerance(dtype):
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}


@pytest.mark.parametrize("name", KERNELS)
def test_the_negative_bit_counts(name):
    dtype = torch.float32 if name == "guided_sample" else torch.float16
    floats, integers = tensors_of(name, dtype)
    expected = called(OPS[name].run, [each.clone() for each in floats], integers)
    read = [i for i in range(len(floats)) if i not in OPS[name].writes]  # a launcher refuses to write to the others
    together = name == "guided_sample"  # one launch takes seconds
    for changed in ([], read) if together else ([], *([i] for i in read)):
        for found, exact in zip(launched(name, floats, integers, changed), expected, strict=True):
            torch.testing.assert_close(found, exact, **tolerance(dtype), msg=f"arguments {changed}")


@pytest.mark.parametrize("name", [name for name in KERNELS if OPS[name].writes])
def test_caches_with_the_negative_bit_are_left_alone(name):
    from genarm_fast.kernels.ragged_attention.triton_append import append
    from genarm_fast.kernels.rotary_append.triton import launch

    for changed in OPS[name].writes:
        floats, integers = tensors_of(name, torch.float32)
        floats[changed] = negated(floats[changed])
        if name == "ragged_append":
            assert append(*floats, *integers) is None
        else:
            y, cos, sin, keys, values, *norms, bias, b = floats
            arguments = y, cos, sin, keys, values, *integers[:2], *norms, 1e-6, bias, b, integers[2]
            assert launch(*arguments) is None


@pytest.mark.parametrize("name", KERNELS)
def test_no_rows_at_all(name):
    floats, integers = without_rows(name, torch.float32)
    expected = called(OPS[name].run, [each.clone() for each in floats], integers)
    for found, exact in zip(launched(name, floats, integers), expected, strict=True):
        assert torch.equal(found, exact)
