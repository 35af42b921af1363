"""The Triton kernels without a GPU: interpreted and compared with the reference, and compiled ahead for four
targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from in_interpreter import NEEDS_NUMPY, run_interpreted

ROOT = Path(__file__).parents[2]


def run(*command, **environment):
    """Run Python in a new process and return its output. triton reads its mode only when it is imported."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


INTERPRETED = [
    "interpreted_values_in_memory",
    "guided_sample/interpreted_guided_sample",
    "guided_sample/interpreted_known_calls",
    "settle/interpreted_settle",
    "ngram_lookup/interpreted_ngram_lookup",
    "ragged_attention/interpreted_ragged_attention",
    "add_rms_norm/interpreted_add_rms_norm",
    "gated_mul/interpreted_gated_mul",
    "rotary_append/interpreted_rotary_append",
    "arm_logps/interpreted_arm_logps",
    "small_linear/interpreted_few_rows",
]


@NEEDS_NUMPY
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name):
    run_interpreted(f"tests/kernels/{name}.py")


SAMPLING = ["1 ARM", "1 ARM, filters", "1 ARM, numbers", "5 drafts", "n-grams"]
ATTENTION = [
    "8B",
    "8B, q = 4",
    "8B, q = 5",
    "70B",
    "8B, q = 512",
    "8B, float32",
    "8B, float32, q = 16",
    "8B, float32, q = 512",
    "D = 80, float16",
    "D = 256, window, softcap, q = 5",
]
LAYER = ["8B layer", "8B layer, r = 16", "0.5B layer, r = 8, norms, gelu", "rotary"]
TRAINING = ["log-probs", "log-probs, softcap, bias"]
PRODUCTS = ["few rows", "few rows, splits", "few rows, float32"]
TYPICAL = [*SAMPLING, *ATTENTION, *LAYER, *TRAINING, *PRODUCTS]
KERNELS = {"scores_kernel", "bound_kernel", "collect_kernel", "draw_kernel", "settle_kernel", "lookup_kernel"}
KERNELS |= {"attend_kernel", "combine_kernel", "append_kernel"}
KERNELS |= {"norm_kernel", "gated_kernel", "rotary_append_kernel", "rotary_kernel", "absorb_kernel", "slopes_kernel"}
KERNELS |= {"few_rows_kernel", "total_kernel"}
ONE_OF_A_ROW = ("attend_kernel", "draw_kernel")  # kernels of few programs, where occupancy matters less
SHARED = {"gfx942": 65536}  # bytes of shared memory that a program may use; on NVIDIA the limit of sm_86 and sm_89


@pytest.mark.parametrize(("target", "cases"), [("sm_80", []), ("sm_90", []), ("sm_100", TYPICAL), ("gfx942", TYPICAL)])
def test_compiled(target, cases):
    """The launchers' specialisations bind and compile, without spills, with wide loads and few registers."""
    chosen = ["--cases", *cases] if cases else []
    kernels = json.loads(run("benchmarks/compiled_kernels.py", "--json", "--targets", target, *chosen))
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED.get(target, 101376), kernel
        assert kernel["registers"] <= (256 if kernel["kernel"] in ONE_OF_A_ROW else 200), kernel
        if kernel["kernel"] == "scores_kernel" and "50257" not in kernel["case"]:
            assert kernel["wide_loads"] >= kernel["loads"] - 4, kernel  # rest: weights and temperature
        if kernel["kernel"] == "scores_kernel" and kernel["case"] == "1 ARM":
            assert kernel["registers"] <= 80, kernel  # 24 or more warps per SM: enough loads in flight
        if kernel["kernel"] in ("norm_kernel", "gated_kernel") and kernel["case"] == "8B layer":
            if target != "gfx942":  # its warps of 64 threads make a program of gated_kernel twice as wide
                assert kernel["wide_loads"] == kernel["loads"], kernel
            assert kernel["registers"] <= 64, kernel
        if kernel["kernel"] in ("absorb_kernel", "slopes_kernel"):
            assert kernel["registers"] <= (64 if kernel["case"] == "log-probs" else 96), kernel
            if kernel["case"] == "log-probs":
                assert kernel["wide_loads"] >= kernel["loads"] - 4, kernel  # rest: numbers of a row
        if kernel["kernel"] == "attend_kernel" and "q = 512" not in kernel["case"]:
            # Narrow loads read positions, a few for each warp. Where the last split combines, narrow loads also read
            # the splits' logarithms.
            narrow = 14 if target == "gfx942" else 56
            assert kernel["wide_loads"] >= kernel["loads"] - narrow, kernel
