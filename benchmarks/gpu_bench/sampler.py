"""Measure guided_sample alone, in a graph and called from Python, beside samplers in eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genarm_fast.device.cuda import Graph
from genarm_fast.kernels import guided_sample

from .measure import Bench, microseconds, read_speed

WEIGHT = 0.5
FILTERS = {"top_p": {"top_p": 0.9}, "top_p and top_k": {"top_p": 0.9, "top_k": 50}}


def table(bench: Bench) -> dict[str, Any]:
    """Return a line for every R and V: the µs to draw R rows from a base and one ARM."""
    speed = bench.read_speed or read_speed(bench.setting)
    lines: list[dict[str, Any]] = []
    for vocab in bench.setting.sampler_vocab:
        for rows in bench.setting.sampler_rows:
            lines.append(measure(bench, rows, vocab, speed))
            bench.note(lines=lines)
    return {"lines": lines}


def measure(bench: Bench, rows: int, vocab: int, speed: float) -> dict[str, Any]:
    setting = bench.setting
    size = 2 * rows * vocab * torch.empty(0, dtype=setting.dtype).element_size()
    sets = [logits(bench, rows, vocab) for _ in range(max(2, setting.cold_bytes // size))]
    draws = {
        "draw": {},
        "with log-probs": {"return_logprobs": True},
        **{f"with {name}": options for name, options in FILTERS.items()},
    }
    found: dict[str, Any] = {"rows": rows, "vocab": vocab, "read_us": 1e6 * size / speed}
    found["graph_us"] = {name: in_graph(bench, sets, drawing(bench, rows, options)) for name, options in draws.items()}
    found["python_us"] = {
        name: called(bench, sets, drawing(bench, rows, options))
        for name, options in draws.items()
        if "with" not in name
    }
    contenders = {"eager gumbel": gumbel, "eager multinomial": multinomial}
    found["eager_us"] = {name: called(bench, sets, function)["us"] for name, function in contenders.items()}
    return found


def logits(bench: Bench, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Return random logits [rows, vocab] of base and ARM, in the dtype of the output layer."""
    base, arm = (
        3 * torch.randn(rows, vocab, device=bench.setting.device, dtype=torch.float32).to(bench.setting.dtype)
        for _ in range(2)
    )
    return base, arm


def drawing(bench: Bench, rows: int, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Any]:
    """Return a call of the op whose parameters are all on the device, as in a decode loop."""
    device = bench.setting.device
    kinds = {"top_k": torch.int64, "top_p": torch.float32}
    given = {
        name: torch.full((rows,), value, dtype=kinds[name], device=device) if name in kinds else value
        for name, value in options.items()
    }
    weights = torch.full((rows, 1), WEIGHT, device=device)
    seeds, positions = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    temperature = torch.ones(rows, device=device)

    def draw(base: Tensor, arm: Tensor) -> Any:
        return guided_sample(base, (arm,), weights, seeds=seeds, positions=positions, temperature=temperature, **given)

    return draw


def in_graph(bench: Bench, sets: list[Any], draw: Callable[..., Any]) -> float:
    """Return the µs of one draw in a graph that draws from each set of logits."""
    stream = torch.cuda.Stream(bench.setting.device)
    with torch.cuda.stream(stream), torch.inference_mode():
        draw(*sets[0])  # compiles the kernels
        torch.cuda.synchronize()
        graph = Graph(stream, torch.cuda.graph_pool_handle(), lambda: tuple(draw(*each).tokens for each in sets), ())
        return microseconds([graph.graph.replay], bench.setting.repeats) / len(sets)


def called(bench: Bench, sets: list[Any], function: Callable[..., Any]) -> dict[str, float]:
    """Return the times of a call from Python.

    us: device time of one call among many. host_us: time until a call returns, while the device may still work.
    """
    calls = [partial(function, *each) for each in sets] * max(1, bench.setting.sampler_calls // len(sets))
    with torch.inference_mode():
        whole = microseconds(calls, bench.setting.repeats)
        host = []
        for call in calls:
            torch.cuda.synchronize()  # empties the queue, so that no call waits for room in it
            start = time.perf_counter()
            call()
            host.append(1e6 * (time.perf_counter() - start))
    return {"us": whole, "host_us": sorted(host)[len(host) // 2]}


def gumbel(base: Tensor, arm: Tensor) -> Tensor:
    """Draw by Gumbel-max in eager PyTorch: the argmax of the scores minus the log of exponential noise."""
    scores = base.float() + WEIGHT * arm.float()
    return (scores - torch.empty_like(scores).exponential_().log_()).argmax(-1)


def multinomial(base: Tensor, arm: Tensor) -> Tensor:
    return (base.float() + WEIGHT * arm.float()).softmax(-1).multinomial(1)
