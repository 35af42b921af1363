"""Measures what a step takes besides the models' forwards: on a GPU the host's work, and on the CPU also sampling.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py [--cpu] [--rows 1 8 32] [--steps 200] [--json]

It needs no GPU: CPU tensors stand for CUDA tensors, and graphs do nothing when they are replayed. All Python code runs
as on CUDA: which sequences take part, what changed, the launch, reading the previous step, text, stop strings, and
which sequences have ended. Copies of small CPU tensors stand for CUDA's launches. With --cpu, steps run on the CPU, and
the time of `ModelRunner.forward` is subtracted. The models are tiny, with a vocabulary of 300 tokens. Figures are
medians over steps of the CPU time of the thread that runs the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cuda_driver import FakeGraph, OnCpuTensors, cuda_driver
from doubles import engines_on
from tiny_models import build_model, build_tokenizer

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.speculation.config import OFF, Speculation

PLANS = {"no drafts": OFF, "4 drafts of an ARM": Speculation("arm", 4), "4 drafts of the text": Speculation("ngram", 4)}
CAPTURED_AFTER = 10  # steps that are left out, since they run piece by piece or are captured


def measure(rows: int, plan: Speculation, steps: int, *, cpu: bool = False) -> float:
    """Return the median microseconds of a step with `rows` requests."""
    times, step, forward = [], Engine._step, ModelRunner.forward
    in_forwards = 0.0

    def timed(engine: Engine) -> Any:
        nonlocal in_forwards
        start, in_forwards = time.thread_time(), 0.0
        advanced = step(engine)
        times.append(time.thread_time() - start - in_forwards)
        return advanced

    def timed_forward(*arguments: Any) -> Any:
        nonlocal in_forwards
        start = time.thread_time()
        logits = forward(*arguments)
        in_forwards += time.thread_time() - start
        return logits

    models = [build_model("llama", seed, max_position_embeddings=steps + 64) for seed in (0, 1)]
    with patch.dict(os.environ, GENARM_FAST_SELFCHECK="never"):  # the tokens of these steps mean nothing
        model = GenARM.from_pretrained(*models, tokenizer=build_tokenizer(), max_batch_size=rows)
    params = SamplingParams(max_new_tokens=steps, ignore_eos=True, seed=1)
    nothing = patch.object(FakeGraph, "replay", lambda _: None)
    with ExitStack() as stack:
        if cpu:
            stack.enter_context(patch.object(ModelRunner, "forward", timed_forward))
        else:
            for each in (cuda_driver(), engines_on(OnCpuTensors()), nothing):
                stack.enter_context(each)
        stack.enter_context(patch.object(Engine, "_step", timed))
        model.generate([[5, 6, 7]] * rows, params, speculation=plan)
    return 1e6 * statistics.median(times[CAPTURED_AFTER:-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="steps on the CPU, less their forwards")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"{name}, {rows} requests": measure(rows, plan, args.steps, cpu=args.cpu)
        for name, plan in PLANS.items()
        for rows in args.rows
    }
    if args.json:
        print(json.dumps(found))
        return
    for name, microseconds in found.items():
        print(f"{name:36s}{microseconds:8.0f} us")


if __name__ == "__main__":
    main()
