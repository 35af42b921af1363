"""Makes threads share one model while faults occur, and checks that answers are right and nothing is left behind.

    OMP_NUM_THREADS=1 python benchmarks/soak_faults.py [--seconds 600] [--threads 6] [--seed 0] [--json FILE]

Threads generate and stream. Streams are abandoned, read slowly and steered. Logits processors raise, allocations of KV
caches fail on purpose, and the main thread is interrupted during calls and forks. Every token is compared with the
answer that the request got alone beforehand. Resident memory, descriptors and threads are read again and again.
Python's memory blocks are counted after a quarter of the time and at the end. A garbage collection precedes each count:
a failed request leaves some 300 objects in reference cycles, since its error's traceback holds the frames of the step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from soak import random_request, resident_bytes, slope, tiny_model, tokens_of

from genarm_fast import GenARM, GenerationError
from genarm_fast.engine.model_runner import ModelRunner

POOL = 40  # requests whose answers are known
FAILING = 0.15  # share of the allocations that fail
SAMPLE = 1.0  # least seconds between two readings


class Deliberate(Exception):
    """The error that a logits processor raises on purpose."""


def raising(ids: Any, scores: Any) -> Any:
    raise Deliberate


class Soak:
    """One model, the requests with their answers, and the counts of a run."""

    def __init__(self, model: GenARM, rng: random.Random) -> None:
        self.model = model
        self.requests = [random_request(rng) for _ in range(POOL)]
        self.alone = [tokens_of(model.generate(*each, speculation="off")[0]) for each in self.requests]
        self.single = [i for i, (_, params) in enumerate(self.requests) if params.n == 1]
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.wrong: list[str] = []

    def count(self, **numbers: int) -> None:
        with self.lock:
            self.counts.update(numbers)

    def check(self, what: str, index: int, found: Any, expected: Any) -> None:
        self.count(compared=1)
        if found != expected:
            with self.lock:
                self.wrong.append(f"{what}: request {index}: {found} instead of {expected}")

    def generate(self, rng: random.Random) -> None:
        chosen = [rng.randrange(POOL) for _ in range(rng.randint(1, 4))]
        prompts, params = zip(*(self.requests[i] for i in chosen))
        try:
            outputs: list[Any] = list(self.model.generate(list(prompts), list(params)))
        except GenerationError as error:
            outputs = error.outputs
            self._expect_failed_step(error)
        self.count(requests=len(chosen))
        for index, output in zip(chosen, outputs):
            if output is not None:
                self.check("generate", index, tokens_of(output), self.alone[index])

    def failing_processor(self, rng: random.Random) -> None:
        """Run a good request beside one whose processor raises, and check that only the latter fails."""
        good, bad = rng.randrange(POOL), rng.randrange(POOL)
        params = [self.requests[good][1], self.requests[bad][1].override(logits_processors=[raising])]
        try:
            self.model.generate([self.requests[good][0], self.requests[bad][0]], params)
            self.check("a processor that raises", bad, "no error", "an error")
        except GenerationError as error:
            self.count(requests=2, processors_raised=1)
            if error.outputs[0] is not None:
                self.check("beside a failing one", good, tokens_of(error.outputs[0]), self.alone[good])

    def stream(self, rng: random.Random) -> None:
        """Stream a request and check its tokens. Some streams are read slowly, left early, or change their weights."""
        index = rng.choice(self.single)
        prompt, params = self.requests[index]
        leave, slow, steer = rng.random() < 0.4, rng.random() < 0.3, rng.random() < 0.3
        found: list[int] = []
        own = self.model.expand_weights(params.weights)
        try:
            with self.model.stream(prompt, params) as stream:
                for chunk in stream:
                    same = [each == own for each in chunk.weights]
                    if not all(same):  # tokens under other weights belong to another text
                        found += chunk.token_ids[: same.index(False)]
                        self.count(streams_steered=1)
                        break
                    found += chunk.token_ids
                    if steer:
                        stream.set_weights([weight + 0.25 for weight in own])
                    if slow:
                        time.sleep(rng.random() * 0.02)
                    if leave and rng.random() < 0.3:
                        self.count(streams_abandoned=1)
                        break
                else:
                    self.check("whole stream", index, [found], self.alone[index])
        except GenerationError as error:
            self._expect_failed_step(error)
        self.count(requests=1, streams=1)
        self.check("stream", index, found, self.alone[index][0][: len(found)])

    def _expect_failed_step(self, error: GenerationError) -> None:
        """Count a failed step as expected if memory ran out, or if Ctrl-C interrupted it; else note it as wrong.

        The main thread's step, which Ctrl-C interrupts, also decodes the requests of other threads."""
        interrupted = "failed: KeyboardInterrupt" in str(error)
        self.count(**{"steps_interrupted" if interrupted else "out_of_memory": 1})
        if "MemoryError" not in repr(error.__cause__) and not interrupted:
            with self.lock:
                self.wrong.append(f"unexpected: {error}")

    def worker(self, seed: int, end: float) -> None:
        rng = random.Random(seed)
        actions = [self.generate] * 4 + [self.stream] * 4 + [self.failing_processor]
        while time.monotonic() < end:
            try:
                rng.choice(actions)(rng)
                if rng.random() < 0.1:
                    self.model.release()
            except Exception as error:  # noqa: PERF203
                with self.lock:
                    self.wrong.append(f"{type(error).__name__}: {error}")

    def interrupted(self, rng: random.Random) -> None:
        """Generate in the main thread, and interrupt it like Ctrl-C at a random moment of the call."""
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.05 + 1e-4)
                self.generate(rng)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)  # the alarm may still come at the start of this line
        except KeyboardInterrupt:
            self.count(interrupts=1)

    def fork(self) -> None:
        """Fork a child that ends at once, as a data loader forks workers, and check that it ends well."""
        child = os.fork()
        if child == 0:
            os._exit(0)
        self.check("fork", child, os.waitpid(child, 0)[1], 0)
        self.count(forks=1)


def soak_faults(seconds: float, *, threads: int = 6, seed: int = 0) -> dict[str, Any]:
    """Run for `seconds` seconds and return the figures of the run."""
    rng = random.Random(seed)
    readings: list[tuple[float, int, int, int]] = []
    blocks: list[int] = []
    own, chance = ModelRunner.reserve, random.Random(seed + 1)

    def reserve(self: ModelRunner, *inputs: Any) -> Any:
        if chance.random() < FAILING:
            soak.count(allocations_failed=1)
            raise MemoryError("on purpose")
        return own(self, *inputs)

    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(tiny_model(Path(folder), 4), rng)
        start = time.monotonic()
        with patch.object(ModelRunner, "reserve", reserve):
            seeds = [rng.getrandbits(32) for _ in range(threads)]
            workers = [threading.Thread(target=soak.worker, args=(each, start + seconds)) for each in seeds]
            for worker in workers:
                worker.start()
            while time.monotonic() < start + seconds:
                soak.interrupted(rng)
                soak.fork()
                time.sleep(rng.random() * 0.1)
                if not readings or time.monotonic() - start - readings[-1][0] > SAMPLE:
                    readings.append((time.monotonic() - start, *_reading()))
                if not blocks and time.monotonic() - start > seconds / 4:
                    blocks.append(_blocks())
            blocks.append(_blocks())
            for worker in workers:
                worker.join()
        for index in range(POOL):  # faults must not affect later requests
            soak.check("after all", index, tokens_of(soak.model.generate(*soak.requests[index])[0]), soak.alone[index])
    steady = readings[len(readings) // 4 :]
    return {
        "seconds": time.monotonic() - start,
        "threads": threads,
        "seed": seed,
        **dict(sorted(soak.counts.items())),
        "wrong": len(soak.wrong),
        "first wrong": soak.wrong[:5],
        "resident MiB, a quarter and the end": [steady[0][1] / 2**20, steady[-1][1] / 2**20],
        "resident slope, KiB a minute": 60 * slope([(int(1000 * t), r) for t, r, *_ in steady]) * 1000 / 2**10,
        "descriptors, a quarter and the end": [steady[0][2], steady[-1][2]],
        "threads, a quarter and the end": [steady[0][3], steady[-1][3]],
        "Python blocks, a quarter and the end": [blocks[0], blocks[-1]],
    }


def _reading() -> tuple[int, int, int]:
    """Return the resident bytes, the number of open descriptors, and the number of threads."""
    return resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()


def _blocks() -> int:
    """Return the number of blocks that Python's allocator holds after a garbage collection.

    `gc.get_objects` would not do: it breaks tuples that another thread is building, which gets a SystemError."""
    gc.collect()
    return sys.getallocatedblocks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = soak_faults(args.seconds, threads=args.threads, seed=args.seed)
    result |= {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    result |= {"date": date.today().isoformat()}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    sys.exit(result["wrong"] > 0)


if __name__ == "__main__":
    main()
