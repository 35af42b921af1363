"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, with tensors on torch's own heap."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))
import sanitized_core  # noqa: E402

CHECK = """
import sanitized_core, sys, torch
from genarm_fast.kernels import _native, guided_sample, ragged_append, ragged_attention, rms_norm, rotary, settle
from genarm_fast.kernels import Lora, SiblingLinears, SmallLinear, silu_mul, small_linear
sanitized_core.load(sys.argv[1])
core = _native.core
torch.manual_seed(0)
dtypes = [torch.float32, torch.bfloat16, torch.float16]
for isa in core.instruction_sets():
    core.use(isa)
    for vocab in (1, 2, 15, 17, 1023, 1024, 1025, 3001):
        for arms in (0, 1, 3):
            logits = [torch.randn(4, 2, vocab).to(dtypes[(i + vocab) % 3]) for i in range(arms + 1)]
            for filters in ({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 2000, "top_p": 0.9, "min_p": 0.1}):
                out = guided_sample(
                    logits[0], logits[1:], [0.5] * arms, temperature=torch.tensor([0.0, 0.5, 1.0, 2.0]), seeds=1,
                    positions=torch.arange(8).view(4, 2), logit_bias=torch.randn(4, vocab), top_logprobs=min(vocab, 3),
                    **filters,
                )
                assert not out.status.any()
    broken = torch.randn(3, 1500)
    broken[0], broken[1, 7] = -torch.inf, torch.nan
    guided_sample(broken, (), [], seeds=0, positions=0, top_p=0.5, top_logprobs=2)
    for dtype in dtypes[:2]:
        for width in (1, 7, 31, 32, 576, 1000):
            rms_norm(torch.randn(3, width).to(dtype), torch.ones(width, dtype=dtype), 1e-6)
            silu_mul(*torch.randn(2, 3, width).to(dtype))
            rotary(*torch.randn(2, 2, 3, 2, 2 * width).to(dtype), *torch.randn(2, 1, 2, 2 * width).to(dtype))
        for width, value_width, group, block, capacity, window in (
            (64, 64, 3, 1, 64, None), (64, 64, 3, 5, 61, 7), (17, 33, 1, 2, 3, None), (1, 1, 8, 4, 30, 1),
            (48, 130, 2, 9, 33, 20), (96, 16, 7, 30, 30, None),
        ):
            cache = [torch.randn(3, 2, capacity, w).to(dtype) for w in (width, value_width)]
            new = [torch.randn(2, 2, block, w).to(dtype) for w in (width, value_width)]
            slots = torch.tensor([2, 0])
            positions = torch.tensor([[0], [capacity - block]]) + torch.arange(block)
            ragged_append(*cache, *new, slots, positions)
            query = torch.randn(2, block, 2 * group, width).to(dtype).transpose(1, 2)
            for softcap in (None, 10.0):
                out = ragged_attention(query, *cache, slots, positions, scale=0.1, window=window, softcap=softcap)
                assert out.isfinite().all()
for width in (1, 4):
    row, block = torch.zeros(5, dtype=torch.int64), torch.ones(5, width, dtype=torch.int64)
    rest = {"lengths": row, "limits": row + 3, "finished": row > 0, "stop_ids": row[:2], "draft_counts": row + width}
    settle(block, block[:, 1:], **rest)
for isa in core.instruction_sets():
    core.use(isa)
    for out, width, rows in ((1, 1, 1), (3, 17, 2), (33, 100, 7), (16, 64, 8), (50, 31, 19)):
        x, weight = torch.randn(rows, width).bfloat16(), torch.randn(out, width).bfloat16()
        a, b = torch.randn(17, width).bfloat16(), torch.randn(17, out).bfloat16()
        y = small_linear(x, weight, weight[:, 0].clone(), loras=[(0, 1, a, b, 1.0), (rows // 2, rows, a, b, 0.5)])
        assert y.isfinite().all()
        linears = [SmallLinear(weight), SmallLinear(weight[:1], loras=[Lora(a, b[:, :1], 1.0)])]
        SiblingLinears(linears)(x, [(), ((0, rows, 0),)])
core.use(core.instruction_sets()[0])
torch.set_num_threads(3)
weight, x = torch.ones(1024, 3072).bfloat16(), torch.ones(9, 3072).bfloat16()
for _ in range(20):
    assert (small_linear(x, weight) == 3072).all()
guided_sample(torch.randn(40, 50257), (), [], seeds=0, positions=0)
print("clean")
"""


BOTH = {"sampling", "settling", "norms", "gates", "rotations", "appending", "attention"}


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    if reason := sanitized_core.missing():
        pytest.skip(reason)
    return sanitized_core.build(tmp_path_factory.mktemp("core"))


def test_sanitized_core(core):
    env = sanitized_core.environment() | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", CHECK, core], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "clean", done.stderr[-4000:]


def test_fuzz(core):
    """Do for 30 s what `make sanitize` does for longer. The seed is fixed, so that only a change can make it fail."""
    command = [sys.executable, SCRIPTS / "fuzz_ops.py", "--seconds", "30", "--seed", "1", "--inside", core]
    done = subprocess.run(command, env=sanitized_core.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(json.loads(done.stdout)["cases"]) >= {*BOTH, "linears", "logps"}


def test_fuzz_in_triton_s_interpreter():
    command = [sys.executable, SCRIPTS / "fuzz_ops.py", "--seconds", "20", "--seed", "1", "--triton"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["clean"]
    assert set(report["cases"]) >= BOTH
