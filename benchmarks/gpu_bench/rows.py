"""The rows, the most important first: if time runs out, later rows are left out."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from .correctness import small_tokens, widened_pair, widened_tokens
from .dry import standing_in
from .machine import clocks, machine
from .measure import Bench, drafting, hf_generate, peak_bytes, seconds_of
from .models import weight_bytes
from .prepare import gpu_tests
from .profile import profile, profile_by_nsys
from .sampler import table
from .schedule import Row
from .settings import DRY, REAL
from .training import table as training_table


def floor(bench: Bench) -> dict[str, Any]:
    """Return W, the numbers that it is computed from, and the clocks."""
    base = bench.model("8b")
    w = bench.w(base)
    found = {"w": w, "weight_bytes": weight_bytes(base), "read_bytes_per_second": bench.read_speed}
    return found | {"clocks": clocks()}  # read right after the device has worked


def lanes(bench: Bench, name: str, arms: int, batch: int) -> dict[str, Any]:
    return bench.decode(bench.lanes(name, arms), bench.setting.batches[batch])


def two_streams(bench: Bench) -> dict[str, Any]:
    """Measure an ARM with its own weights, which runs beside the base on its own stream."""
    arm = bench.model("1b", 1)
    found = bench.decode(bench.decoder("8b + 1b", bench.model("8b"), [arm]))
    return found | {"w_arm": bench.w(arm)}


def drafts(bench: Bench) -> dict[str, Any]:
    """Measure the widened pair, whose base has an 8B model's bytes: without drafts, with K drafts, and with "auto"."""
    model = widened_pair(bench)
    prompts = bench.pair().prompts
    bench.note(models=bench.pair().name, acceptance_is_real=int(bench.pair().real))
    bench.note(plain=bench.decode(model, prompts=prompts))
    for k in (*bench.setting.drafts, None):
        drafted = bench.decode(model, prompts=prompts, speculation=drafting(model.arm_names[0], k))
        bench.note(**{"auto" if k is None else f"K = {k}": drafted})
    found = bench.so_far
    best = min((name for name in found if isinstance(found[name], dict)), key=lambda name: found[name]["x_w"])
    return found | {"best": best, **{key: found[best][key] for key in ("ms", "w", "x_w", "peak_bytes")}}


def long_context(bench: Bench) -> dict[str, Any]:
    rounds = min(2, bench.setting.rounds)  # a round reads 64,000 tokens of prompts
    return bench.decode(
        bench.lanes("8b", 1), bench.setting.batches[1], context=bench.setting.long_context, rounds=rounds
    )


def first_token(bench: Bench) -> dict[str, Any]:
    """Measure calls that generate one token: by the unguided base, with a LoRA ARM, and by Hugging Face's base."""
    length, plain, guided = bench.setting.first_token, bench.lanes("8b", 0), bench.lanes("8b", 1)

    def ours(model: Any) -> None:
        model.generate(bench.prompts(1, length, model.vocab_size), max_new_tokens=1, ignore_eos=True, seed=1)

    runs = {
        "ms": partial(ours, plain),
        "guided_ms": partial(ours, guided),
        "hugging_face_ms": partial(hf_generate, bench, plain.base.model, 1, length=length),
    }
    bench.note(context=length)
    for name, run in runs.items():
        times = [seconds_of(run) for _ in range(2 + bench.setting.rounds)]
        bench.note(**{name: 1e3 * statistics.median(times[2:])})
    found = bench.so_far
    return found | {"x_hugging_face": found["ms"] / found["hugging_face_ms"], "peak_bytes": peak_bytes()}


def about(bench: Bench) -> dict[str, Any]:
    return machine(bench.setting.device)


@contextmanager
def benching(name: str) -> Iterator[Bench]:
    """Give the block the `Bench` of the setting with this name; a trial gets stand-ins for the GPU."""
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    with standing_in() if name == DRY.name else nullcontext():
        yield Bench({setting.name: setting for setting in (REAL, DRY)}[name])


MACHINE = Row("machine", about, 5)
ROWS = [
    Row("gpu tests", gpu_tests, 95),
    Row("tokens, SmolLM2", small_tokens, 15),
    Row("tokens, widened", widened_tokens, 15, group="tokens"),
    Row("W", floor, 6, group="8b"),
    Row("base", partial(lanes, name="8b", arms=0, batch=0), 12, group="8b"),
    Row("1 LoRA", partial(lanes, name="8b", arms=1, batch=0), 14, group="8b"),
    Row("Hugging Face, eager", partial(Bench.hugging_face, name="8b"), 10, group="8b"),
    Row("1 LoRA, 8 requests", partial(lanes, name="8b", arms=1, batch=1), 7, group="8b"),
    Row("1 LoRA, 32 requests", partial(lanes, name="8b", arms=1, batch=2), 8, group="8b"),
    Row("first token", first_token, 6, group="8b"),
    Row("context 4,000, 8 requests", long_context, 20, group="8b"),
    Row("2 LoRAs", partial(lanes, name="8b", arms=2, batch=0), 14, group="8b + 2"),
    Row("8B + 1B ARM", two_streams, 14, group="8b + 1b"),
    Row("drafts", drafts, 28, group="widened"),
    Row("sampler", table, 15, group="sampler"),
    Row("135M", partial(lanes, name="135m", arms=0, batch=0), 7, group="135m"),
    Row("135M, 1 LoRA", partial(lanes, name="135m", arms=1, batch=0), 7, group="135m"),
    Row("training", training_table, 10, group="training"),
    Row("profile", profile, 16, group="profile"),  # follows most timed rows: a profiler slows later launches
    Row("Hugging Face, compiled", partial(Bench.hugging_face, name="8b", compiled=True), 75, group="compiled"),
    Row("profile, nsys", profile_by_nsys, 60, group="nsys"),
]
