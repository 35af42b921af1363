"""Host time of an engine's step on a GPU, measured without one: CPU tensors, and graphs that do nothing when replayed.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py [--rows 1 8 32] [--steps 200] [--json]

All of Python runs as it does on CUDA: who takes part, what changed, the launch, reading the step before, text, stop
strings, and who has ended. Copies of small tensors on the CPU stand for CUDA's launches. The clock is CPU time of the
thread that steps, medians over steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
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
from genarm_fast.speculation.config import OFF, Speculation

PLANS = {"no drafts": OFF, "4 drafts of an ARM": Speculation("arm", 4), "4 drafts of the text": Speculation("ngram", 4)}
CAPTURED_AFTER = 10  # steps: those before run piece by piece, or are captured


def measure(rows: int, plan: Speculation, steps: int) -> float:
    """Median microseconds of a step of so many requests."""
    times, step = [], Engine._step

    def timed(engine: Engine) -> Any:
        start = time.thread_time()
        advanced = step(engine)
        times.append(time.thread_time() - start)
        return advanced

    models = [build_model("llama", seed, max_position_embeddings=steps + 64) for seed in (0, 1)]
    model = GenARM.from_pretrained(*models, tokenizer=build_tokenizer(), max_batch_size=rows)
    params = SamplingParams(max_new_tokens=steps, ignore_eos=True, seed=1)
    nothing = patch.object(FakeGraph, "replay", lambda _: None)
    unchecked = patch.dict(os.environ, GENARM_FAST_SELFCHECK="never")  # tokens mean nothing here
    with cuda_driver(), engines_on(OnCpuTensors()), nothing, unchecked, patch.object(Engine, "_step", timed):
        model.generate([[5, 6, 7]] * rows, params, speculation=plan)
    return 1e6 * statistics.median(times[CAPTURED_AFTER:-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"{name}, {rows} requests": measure(rows, plan, args.steps)
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
