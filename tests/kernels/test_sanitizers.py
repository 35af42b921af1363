"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, over torch's own heap."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "kernels/csrc"
FLAGS = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
FLAGS += [
    "-fno-sanitize-recover=all",
    "-ffp-contract=off",
    "-DGENARM_X86",
    f"-I{CSRC}",
    f"-I{sysconfig.get_path('include')}",
]
LOOPS = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}
CHECK = """
import importlib.machinery, importlib.util, sys, torch
from genarm_fast.kernels import _native, guided_sample, ragged_append, ragged_attention, rms_norm, rotary, settle
from genarm_fast.kernels import Lora, SiblingLinears, SmallLinear, silu_mul, small_linear
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
core = _native.core = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
core.use_tensors(torch.Tensor)
core.use_threads(torch.get_num_threads)
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


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86-64 Linux build flags")
def test_sanitized_core(tmp_path):
    compiler = shutil.which("g++")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if compiler is None or not os.path.isabs(runtime):
        pytest.skip("no g++ with AddressSanitizer")
    core = tmp_path / "_C.abi3.so"
    names = {file: "-".join(file.relative_to(CSRC).with_suffix("").parts) for file in CSRC.rglob("*.cpp")}
    loops = [file for file in names if file.stem == "loops"]
    jobs = {f"{names[file]}-{isa}": [file, f"-DISA={isa}", *flags] for file in loops for isa, flags in LOOPS.items()}
    jobs |= {name: [file] for file, name in names.items() if file not in loops}
    compiling = [
        subprocess.Popen([compiler, *FLAGS, *arguments, "-c", "-o", tmp_path / f"{name}.o"])
        for name, arguments in jobs.items()
    ]
    assert [process.wait() for process in compiling] == [0] * len(jobs)
    objects = [tmp_path / f"{name}.o" for name in jobs]
    subprocess.run([compiler, "-shared", "-fsanitize=address,undefined", *objects, "-o", core, "-pthread"], check=True)
    env = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK, core], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "clean", done.stderr[-4000:]
