"""The goals of the benchmark, beside the figures of the library and of a prototype on an H100 on 2026-11-27."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """A limit for one figure.

    value: computes the figure from a result's rows by name; it raises KeyError if a row has no numbers. before,
    prototype: the figures of the library and of a prototype on an H100 on 2026-11-27, in the goal's unit.
    """

    title: str
    value: Callable[[Rows], float]
    limit: float
    unit: str
    at_most: bool = True
    before: str = "-"
    prototype: str = "-"

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def _w(row: str) -> Callable[[Rows], float]:
    return lambda rows: rows[row]["x_w"]


def _ms(row: str) -> Callable[[Rows], float]:
    return lambda rows: rows[row]["ms"]


def _faster(other: str) -> Callable[[Rows], float]:
    return lambda rows: rows[other]["ms"] / rows["1 LoRA"]["ms"]


FIRST = "first token of a prompt of 2,048, against Hugging Face's"
GOALS = [
    Goal("base, batch 1", _w("base"), 1.20, "W", before="2.24", prototype="1.27"),
    Goal("+ 1 LoRA ARM, batch 1", _w("1 LoRA"), 1.25, "W", before="2.76", prototype="1.40"),
    Goal("+ 1 LoRA ARM, batch 8", _w("1 LoRA, 8 requests"), 1.32, "W", before="3.1", prototype="1.47"),
    Goal("+ 1 LoRA ARM, batch 32", _w("1 LoRA, 32 requests"), 1.42, "W", prototype="1.56"),
    Goal("+ 2 LoRA ARMs, batch 1", _w("2 LoRAs"), 1.28, "W", before="3.2", prototype="1.41"),
    Goal("8B + 1B ARM, two streams, no drafts", _w("8B + 1B ARM"), 1.35, "W", before="2.6", prototype="1.42"),
    Goal("the widened pair with drafts, a token", _w("drafts"), 0.60, "W", prototype="0.54-0.72 by arithmetic"),
    Goal(
        "guided against Hugging Face's base, compiled",
        _faster("Hugging Face, compiled"), 1.7, "x", False, before="0.8", prototype="1.6",
    ),
    Goal("guided against Hugging Face's base, eager", _faster("Hugging Face, eager"), 4, "x", False, prototype="3.9"),
    Goal("8 requests at context 4,000, 1 LoRA ARM", _w("context 4,000, 8 requests"), 1.9, "W", prototype="1.61 (base)"),
    Goal("135M + 1 LoRA ARM, batch 1", _ms("135M, 1 LoRA"), 0.7, "ms", before="6.3", prototype="0.93 (base)"),
    Goal(FIRST, lambda rows: rows["first token"]["x_hugging_face"], 1.0, "x"),
]  # fmt: skip


def sampler_goals(lines: list[dict[str, Any]]) -> list[tuple[str, float | None, float, str]]:
    """Return (title, value, limit, unit) of each goal of the sampler.

    The host's time comes from all lines, the other values from the lines at the widest vocabulary.
    """
    widest = max((line["vocab"] for line in lines), default=0)
    at = {line["rows"]: line for line in lines if line["vocab"] == widest}

    def graph(rows: int, name: str = "draw", over: Callable[[dict[str, Any]], float] = lambda line: 1) -> float | None:
        return at[rows]["graph_us"][name] / over(at[rows]) if rows in at else None

    def reading(line: dict[str, Any]) -> float:
        return line["read_us"]

    def draw(line: dict[str, Any]) -> float:
        return line["graph_us"]["draw"]

    both = "with top_p and top_k"
    host = max((line["python_us"]["draw"]["host_us"] for line in lines), default=None)
    return [
        ("called from Python: host time", host, 40, "µs"),
        ("in a graph, R = 1", graph(1), 15, "µs"),
        ("in a graph, R = 64, against reading once", graph(64, over=reading), 1.3, "x"),
        ("in a graph, R = 256, against reading once", graph(256, over=reading), 1.3, "x"),
        ("top-p and top-k against a plain draw, R = 256", graph(256, both, draw), 2, "x"),
        ("top-p and top-k, R = 128", graph(128, both), 250, "µs"),
    ]
