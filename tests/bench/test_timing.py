"""The order of contenders, intervals of medians, and clocks."""

from __future__ import annotations

import random
import time

import pytest
import torch

from genarm_fast.bench.timing import Interval, clock_of, interval, take_turns


def test_contenders_take_turns_and_the_first_round_is_not_timed() -> None:
    now, calls = 0.0, []

    def contender(name: str, seconds: float):
        def run(turn: int) -> None:
            nonlocal now
            calls.append((turn, name))
            now += seconds if turn else 1000.0

        return run

    def between() -> None:
        nonlocal now
        now += 50.0

    found = take_turns({"a": contender("a", 1.0), "b": contender("b", 3.0)}, 3, lambda: now, between)
    assert found == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert [name for _, name in calls] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [turn for turn, _ in calls] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(1, 1, 1), (4, 1, 4), (5, 1, 5), (7, 1, 7), (8, 2, 7), (10, 2, 9), (20, 6, 15), (50, 19, 32)],
)
def test_interval_of_a_median(count: int, low: int, high: int) -> None:
    """The intervals equal those in tables of the sign test, from 5 values on."""
    values = [float(value) for value in range(1, count + 1)]
    random.Random(count).shuffle(values)
    assert interval(values) == Interval((count + 1) / 2, low, high)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    found = [interval([draw.expovariate(1.0) for _ in range(8)]) for _ in range(4000)]
    held = sum(each.low <= 0.6931 <= each.high for each in found) / len(found)
    assert 0.91 < held < 0.95  # 0.930: the next narrower interval has 0.71


def test_spread() -> None:
    assert Interval(10.0, 9.0, 12.0).spread == pytest.approx(0.15)


def test_clock_is_cpu_time_only_for_one_thread_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert clock_of([cpu, cpu]) == ("CPU time", time.process_time)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock_of([cpu])[0] == "wall clock"


def test_devices_are_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(str(device)))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("read") or 7.0)
    name, clock = clock_of([torch.device(each) for each in ("cuda:0", "cpu", "cuda:1", "meta", "cuda:0")])
    assert (name, clock()) == ("wall clock", 7.0)
    assert sorted(events[:2]) == ["cuda:0", "cuda:1"]
    assert events[2:] == ["read"]
