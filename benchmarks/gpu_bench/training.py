"""Measure time and memory of a forward and backward pass of arm_logps, the training loss, beside full logits."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genarm_fast.kernels import arm_logps, arm_logps_reference

from .measure import Bench, peak_bytes, seconds_of

HEADS = ("frozen", "trained")  # output layers under LoRA and under full fine-tuning
CONTENDERS = {"arm_logps": arm_logps, "full logits": arm_logps_reference}


def table(bench: Bench) -> dict[str, Any]:
    """Return a line for each head. Peaks count the memory beyond that allocated before, with the gradients."""
    rows, length, width, vocab = bench.setting.training
    device, dtype = bench.setting.device, bench.setting.dtype
    hidden, weight = (
        torch.randn(*shape, width, device=device, dtype=torch.float32).mul_(0.1).to(dtype).requires_grad_()
        for shape in ((rows, length), (vocab,))
    )
    labels = torch.randint(0, vocab, (rows, length), device=device)
    lines: list[dict[str, Any]] = []
    for head in HEADS:
        weight.requires_grad_(head == "trained")
        line: dict[str, Any] = {"head": head}
        for name, function in CONTENDERS.items():
            run = partial(step, function, hidden, weight, labels)
            run()  # compiles the kernels
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times = [seconds_of(run) for _ in range(bench.setting.rounds)]
            line[name] = {"ms": 1e3 * statistics.median(times), "peak_bytes": peak_bytes() - before}
        lines.append(line)
        bench.note(lines=lines)
    shape = {"rows": rows, "tokens": length, "width": width, "vocab": vocab}
    return {**shape, "lines": lines}


def step(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    function(hidden, weight, labels).sum().backward()
    hidden.grad = weight.grad = None
