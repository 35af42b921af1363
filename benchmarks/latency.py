"""Measures the time to the first token and the gaps between tokens, for one caller and for many.

    OMP_NUM_THREADS=1 python benchmarks/latency.py [BASE ARM ...] [--parts one callers ticker other vllm]
        [--callers 8 32] [--loads 0.3 0.6 0.9] [--requests 24] [--prompt 32] [--tokens 16] [--max-step-ms 150]
        [--plot FILE] [--json]

Without a BASE, the demo's base and its ARM `small` are used. Callers are tasks of one event loop that read `astream`.
With n callers, at most n requests are decoded together. In the closed loop, n callers ask again as soon as they have
an answer: their requests per second are the capacity. At a load, which is a share of the capacity, requests arrive as a
Poisson process. Times are wall-clock milliseconds since a request's arrival.

`ticker` is a task that sleeps for 1 ms again and again, first alone, then while 16 requests decode. The first part
shows how late the machine itself wakes a task. `other` is Hugging Face's `generate` over the base alone, one request
after another, as in a service without an engine. Its loads are shares of its own capacity. `vllm` is vLLM's engine
over the base alone, with as many requests together. It runs where vLLM is installed, for example after `make test-vllm`
by `OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/latency.py --parts vllm`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from latency_vllm import by_vllm, vllm_engine
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from genarm_fast import ARM, GenARM, demo

SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
PARTS = ["one", "callers", "ticker", "other", "vllm"]
READ_AHEAD = 1_000_000  # chunks that may wait for the reader, which only notes their times
Request = Callable[[int, Callable[[], None]], Awaitable[None]]  # takes its number, and a function to call at each chunk


@dataclass
class Times:
    """The seconds until each request's first chunk, and those between the chunks of a request."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    async def of(self, request: Request, number: int, arrival: float) -> None:
        """Note the times of one request."""
        marks: list[float] = []
        await request(number, lambda: marks.append(time.perf_counter()))
        self.first.append(marks[0] - arrival)
        self.gaps += [after - before for before, after in itertools.pairwise(marks)]


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the percentiles of SHARES, in milliseconds."""
    ordered = sorted(seconds)
    return {name: 1e3 * ordered[max(math.ceil(share * len(ordered)) - 1, 0)] for name, share in SHARES.items()}


async def closed(request: Request, callers: int, requests: int) -> tuple[Times, float]:
    """Run callers that ask again as soon as they have an answer; return the times, and the requests per second."""
    times, numbers = Times(), iter(range(requests))

    async def caller() -> None:
        for number in numbers:
            await times.of(request, number, time.perf_counter())

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return times, requests / (time.perf_counter() - start)


async def arriving(request: Request, rate: float, requests: int) -> Times:
    """Run requests that arrive as a Poisson process, `rate` per second on average, and return their times."""
    times, rng, tasks = Times(), random.Random(0), []
    at = time.perf_counter()
    for number in range(requests):
        await asyncio.sleep(at - time.perf_counter())
        tasks.append(asyncio.create_task(times.of(request, number, at)))
        at += rng.expovariate(rate)
    await asyncio.gather(*tasks)
    return times


async def ticking(work: Awaitable[Any]) -> list[float]:
    """Sleep for 1 ms again and again until `work` is done; return the seconds by which each sleep ended late."""
    late, task = [], asyncio.ensure_future(work)
    while not task.done():
        due = time.perf_counter() + 1e-3
        await asyncio.sleep(1e-3)
        late.append(time.perf_counter() - due)
    await task
    return late


def prompt_of(number: int, length: int, vocab_size: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(3, vocab_size) for _ in range(length)]


def ours(model: GenARM, prompt: int, tokens: int, vocab_size: int) -> Request:
    async def request(number: int, mark: Callable[[], None]) -> None:
        params = {"max_new_tokens": tokens, "ignore_eos": True, "seed": number}
        async for _ in model.astream(prompt_of(number, prompt, vocab_size), ahead=READ_AHEAD, **params):
            mark()

    return request


def hugging_face(base: Any, prompt: int, tokens: int, vocab_size: int) -> Request:
    turn = asyncio.Lock()

    class Marks(BaseStreamer):
        def __init__(self, mark: Callable[[], None]) -> None:
            self.mark, self.begun = mark, False

        def put(self, value: Any) -> None:
            if self.begun:  # the first call has the prompt
                self.mark()
            self.begun = True

        def end(self) -> None:
            pass

    async def request(number: int, mark: Callable[[], None]) -> None:
        ids = torch.tensor([prompt_of(number, prompt, vocab_size)])
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "streamer": Marks(mark)}
        async with turn:
            await asyncio.to_thread(base.generate, ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return request


async def measure(
    name: str, request: Request, callers: int, loads: list[float], requests: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a result line for the closed loop, and one for each load."""
    times, capacity = await closed(request, callers, max(requests, 2 * callers))
    lines = [("closed loop", capacity, times)]
    for load in loads:
        lines.append((f"{load:.0%}", load * capacity, await arriving(request, load * capacity, requests)))
        log(f"{name}, {callers} callers, {load:.0%}")
    return [
        {
            "contender": name,
            "callers": callers,
            "load": load,
            "requests/s": rate,
            "first": percentiles(each.first),
            "gap": percentiles(each.gaps),
        }
        for load, rate, each in lines
    ]


async def run(
    source: str, model: GenARM, base: Any, args: argparse.Namespace, log: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all parts and return their results. base: the loaded model of `source`, None without the part `other`."""
    shape = args.prompt, args.tokens, model.vocab_size
    request, results = ours(model, *shape), []
    found: dict[str, Any] = {"results": results}
    if "one" in args.parts:
        await closed(request, 1, 2)
        results += await measure("genarm_fast", request, 1, [], args.requests, log)
    for callers in args.callers if "callers" in args.parts else []:
        model.max_batch_size = callers
        await closed(request, callers, callers)
        results += await measure("genarm_fast", request, callers, args.loads, args.requests, log)
    if "ticker" in args.parts:
        model.max_batch_size = 16
        for name, work in (("ticker alone", asyncio.sleep(args.alone)), ("ticker", closed(request, 16, 32))):
            late = await ticking(work)
            found[name] = {**percentiles(late), "ticks": len(late)}
    if "other" in args.parts:
        plain = hugging_face(base, *shape)
        await closed(plain, 1, 2)
        results += await measure("Hugging Face, base", plain, 1, args.loads, args.requests, log)
    for callers in args.callers if "vllm" in args.parts else []:
        with vllm_engine(source, callers, args.prompt + args.tokens) as engine:
            plain = by_vllm(engine, lambda number: prompt_of(number, args.prompt, model.vocab_size), args.tokens)
            await closed(plain, callers, callers)
            results += await measure("vLLM, base", plain, callers, args.loads, args.requests, log)
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the percentiles over the load."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what, title in zip(axes, ("first", "gap"), ("time to the first token", "gap between tokens")):
        groups = dict.fromkeys((line["contender"], line["callers"]) for line in found["results"])
        for (contender, callers), colour in zip(groups, ["#000000", "#4878a8", "#c85200", "#5fa052"] * len(groups)):
            lines = [
                line
                for line in found["results"]
                if (line["contender"], line["callers"]) == (contender, callers) and line["load"].endswith("%")
            ]
            loads = [int(line["load"][:-1]) for line in lines]
            for name, style in (("p50", "o-"), ("p99", "s--"), ("max", "^:")):
                label = f"{contender}, {callers}: {name}"
                if lines:
                    axis.plot(loads, [line[what][name] for line in lines], style, color=colour, label=label)
        axis.set(title=title, xlabel="load, % of capacity", ylabel="ms", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:.0f}")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def show(found: dict[str, Any]) -> None:
    table = Table(title="ms; " + ", ".join(f"{name} {value}" for name, value in found["about"].items()))
    names = ("contender", "callers", "load", "requests/s")
    for name in (*names, *(f"{what} {share}" for what in ("first", "gap") for share in SHARES)):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for line in found["results"]:
        numbers = [f"{line[what][share]:.0f}" for what in ("first", "gap") for share in SHARES]
        table.add_row(line["contender"], str(line["callers"]), line["load"], f"{line['requests/s']:.2f}", *numbers)
    Console(width=180).print(table)
    for name in [name for name in ("ticker alone", "ticker") if name in found]:
        late = ", ".join(f"{key} {value:.1f}" for key, value in found[name].items())
        print(f"{name}, late by, in ms: {late}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="a model's folder")
    parser.add_argument("arms", nargs="*", metavar="arm", help="folders of ARMs")
    here = [part for part in PARTS if part != "vllm" or find_spec("vllm")]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=here, help="vllm: where it is installed")
    parser.add_argument("--callers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--requests", type=int, default=24, help="of each line")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a request")
    parser.add_argument("--alone", type=float, default=10.0, help="seconds of the ticker without requests")
    parser.add_argument("--max-step-ms", type=float)
    parser.add_argument("--speculation", default="off")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    source = args.base or str(demo.base())
    arms = [ARM(arm) for arm in args.arms] if args.base else [ARM(demo.arm("small"))]
    model = GenARM.from_pretrained(source, arms, max_step_ms=args.max_step_ms, speculation=args.speculation)
    other = "other" in args.parts
    base = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False).eval() if other else None
    console = Console(stderr=True)
    found = asyncio.run(run(source, model, base, args, console.print))
    found["about"] = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "requests": args.requests,
        "max_step_ms": args.max_step_ms,
        "speculation": args.speculation,
    }
    if args.plot:
        plot(found, args.plot)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
