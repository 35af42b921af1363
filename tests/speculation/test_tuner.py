"""The tuner on simulated steps."""

from __future__ import annotations

import json
import random
import time

import pytest
from simulated_steps import MAX_K, Ahead, Draft, Whole, World, simulate, tuner_for

from genarm_fast.speculation.config import TunerConfig
from genarm_fast.speculation.observations import PLAIN, Choice, StepObservation
from genarm_fast.speculation.tuner import Tuner

PAIR = Draft(0.7, cost=0.1, member=True)
WORLDS = {
    "small ARM": World([PAIR]),
    "good small ARM": World([Draft(0.9, cost=0.05, member=True)]),
    "ARM of the base's size": World([Draft(0.6, cost=1.0, member=True)]),
    "n-gram, few matches": World([Draft(0.6, active=0.2)]),
    "n-gram, repetition": World([Draft(0.9, active=0.9)]),
    "poor drafter": World([Draft(0.05, cost=0.3)]),
    "no overlap": World([Draft(0.0, cost=0.1, member=True)]),
    "dear verification": World([PAIR], slope=0.5),
    "three": World([PAIR, Draft(0.5, active=0.3), Draft(0.8, cost=0.4)]),
    "three poor ones": World([Draft(0.1, cost=0.5), Draft(0.0, active=1.0), Draft(0.1, cost=0.3, member=True)]),
}


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("name", WORLDS)
def test_near_the_best_choice_and_never_much_slower_than_plain(name: str, rows: int) -> None:
    world = WORLDS[name]
    found = []
    for seed in range(3):
        world.random = random.Random(seed)
        tuner = tuner_for(world)
        simulate(world, tuner, rows, 60)
        found.append(simulate(world, tuner, rows, 400))
    best = world.seconds_per_token(world.best(rows), rows) / world.seconds_per_token(PLAIN, rows)
    assert best * max(found) < 1.03
    assert sum(found) / len(found) < 1.06


REAL = [Draft(0.5, cost=0.1, member=True), Draft(0.3, active=0.1), Draft(0.5, cost=1.0, member=True)]


def loss_of_a_new_model(rows: int, slope: float) -> float:
    """Return seconds per token relative to plain decoding in the first 64 steps, for a small ARM, n-grams and their
    base."""
    found = []
    for seed in range(5):
        world = World(REAL, slope=slope, rest=0.05, random=random.Random(seed))
        found.append(simulate(world, tuner_for(world), rows, 64) * world.seconds_per_token(world.best(rows), rows))
    return sum(found) / len(found) / world.seconds_per_token(PLAIN, rows)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
def test_drafts_that_lose_are_hardly_tried(rows: int) -> None:
    """The slopes are a CPU's (docs/speculation.md) and worse ones, in one call of 64 tokens."""
    for slope in (0.06, 0.1, 0.3):
        assert loss_of_a_new_model(rows, slope) < 1.03


def test_without_shadow_evaluation_drafts_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuner, "observe_shadow", lambda *_: None)
    assert loss_of_a_new_model(32, 0.06) > 1.04


def test_a_drafter_that_never_wins_is_tried_more_and_more_seldom() -> None:
    def tries(config: TunerConfig) -> int:
        world = World([Draft(0.1, cost=0.5, member=True)])
        tuner = tuner_for(world, config)
        simulate(world, tuner, 8, 1500)
        return tuner.drafters[0].steps

    assert tries(TunerConfig()) <= 8
    assert tries(TunerConfig(max_retry_steps=16)) > 16


@pytest.mark.parametrize("rows", [1, 8])
def test_warm_up_is_short(rows: int) -> None:
    world = World([Draft(0.9, cost=0.05, member=True), Draft(0.1, cost=0.5)])
    tuner = tuner_for(world)
    simulate(world, tuner, rows, 15)
    assert simulate(world, tuner, rows, 30) < 1.2


REPEATS = {False: Draft(0.2, active=0.05), True: Draft(0.95, active=0.95)}


@pytest.mark.parametrize("alone", [True, False], ids=["n-gram alone", "beside a small ARM"])
def test_a_text_that_starts_and_stops_to_repeat_its_prompt(alone: bool) -> None:
    others = [] if alone else [PAIR]
    worlds = {repeats: World([draft, *others]) for repeats, draft in REPEATS.items()}
    tuner = tuner_for(worlds[False])
    simulate(worlds[False], tuner, 1, 300)
    assert simulate(worlds[False], tuner, 1, 100) < 1.15
    simulate(worlds[True], tuner, 1, 80)
    assert simulate(worlds[True], tuner, 1, 100) < 1.2
    simulate(worlds[False], tuner, 1, 30)
    assert simulate(worlds[False], tuner, 1, 100) < 1.15


def test_without_trials_the_change_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuner, "observe_shadow", lambda *_: None)
    config = TunerConfig(exploration=0.0, exploration_of_savings=0.0)
    tuner = tuner_for(World([REPEATS[False], PAIR]), config)
    simulate(World([REPEATS[False], PAIR]), tuner, 1, 300)
    simulate(World([REPEATS[True], PAIR]), tuner, 1, 80)
    assert simulate(World([REPEATS[True], PAIR]), tuner, 1, 100) > 1.5


def test_a_machine_that_slows_down_for_a_while() -> None:
    world = World([Draft(0.6, cost=0.2, member=True)])
    tuner = tuner_for(world)
    simulate(world, tuner, 1, 200)
    slow = World(world.drafts)
    slow.timed = lambda seconds: 2 * world.timed(seconds)  # type: ignore[method-assign]
    assert simulate(slow, tuner, 1, 60) < 1.1
    assert simulate(world, tuner, 1, 60) < 1.1


def test_forwards_that_are_held_up_do_no_harm() -> None:
    """The latest timing alone would not cope with them."""

    def regret(config: TunerConfig) -> float:
        found = []
        for seed in range(5):
            world = World([PAIR], noise=0.3, random=random.Random(seed))
            tuner = tuner_for(world, config)
            simulate(world, tuner, 8, 60)
            found.append(simulate(world, tuner, 8, 200) - 1)
        return sum(found) / len(found)

    robust = regret(TunerConfig())
    assert robust < 0.06
    assert regret(TunerConfig(timings=1)) > 1.5 * robust


def test_rows_that_end_one_by_one() -> None:
    world = World([PAIR], slope=0.1)
    tuner = tuner_for(world)
    lost = {rows: simulate(world, tuner, rows, 20) for rows in (*range(32, 0, -1), *range(32, 0, -1))}
    assert max(lost.values()) < 1.3
    assert sum(lost.values()) / len(lost) < 1.06


@pytest.mark.parametrize("rows", [1, 4])
def test_drafts_ahead_are_reckoned_with(rows: int) -> None:
    lost = {True: 0.0, False: 0.0}
    for ahead in lost:
        for seed in range(3):
            world = Ahead([Draft(0.8, cost=0.5, member=True)], random=random.Random(seed))
            tuner = Tuner(["d0"], MAX_K, ahead=ahead)
            simulate(world, tuner, rows, 60)
            lost[ahead] += simulate(world, tuner, rows, 300) / 3
    assert lost[True] < 1.06
    assert lost[True] < lost[False] - 0.01


def test_the_same_steps_give_the_same_choices() -> None:
    def choices() -> list[Choice]:
        world = World([PAIR, Draft(0.5, active=0.5)], random=random.Random(3))
        tuner = tuner_for(world)
        made = []
        for _ in range(200):
            made.append(tuner.choose(2))
            world.step(tuner, made[-1], 2)
        return made

    assert choices() == choices()
    assert len(set(choices())) > 4


def test_without_drafters_it_is_plain_decoding() -> None:
    world = World([])
    tuner = tuner_for(world)
    assert simulate(world, tuner, 3, 20) == pytest.approx(1.0)
    assert tuner.stats()["steps"] == {"plain": 20}


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("name", WORLDS)
def test_steps_that_are_one_launch(name: str, rows: int) -> None:
    """Whole steps do as well as steps whose parts are timed: near the best choice, and never much slower than plain
    decoding."""
    found = []
    for seed in range(3):
        world = Whole(WORLDS[name].drafts, WORLDS[name].slope, random=random.Random(seed))
        tuner = tuner_for(world)
        simulate(world, tuner, rows, 60)
        found.append(simulate(world, tuner, rows, 400))
    best = world.seconds_per_token(world.best(rows), rows) / world.seconds_per_token(PLAIN, rows)
    assert best * max(found) < 1.03
    assert sum(found) / len(found) < 1.06


def test_a_launch_counts_as_one_cost() -> None:
    """The cost depends on drafts and rows, whatever was proposed. The parts of the launch get no times."""
    tuner = Tuner(["d"], 4)
    for _ in range(3):
        tuner.choose(2)
        tuner.observe(StepObservation(None, 2, 0, [], [], 0.0, 1.0))
    for k, seconds, proposed in ((1, 1.2, [1, 1]), (3, 1.6, [3, 0]), (3, 1.6, [0, 0])):
        tuner.choose(2)
        tuner.observe(StepObservation(0, 2, k, proposed, [0, 0], None, seconds))
    stats = tuner.stats()
    assert stats["plain_seconds"] == {"2": 1.0}
    drafter = stats["drafters"]["d"]
    assert drafter["whole_seconds"] == {2: {"2": 1.2, "4": 1.6}}
    assert drafter["draft_seconds"] == drafter["verify_seconds"] == {}
    acceptance, gains = tuner.drafters[0].acceptance(), [1.0]
    active, right = tuner.drafters[0].activity.value(1.0), 1.0
    for each in acceptance:
        right *= each
        gains.append(gains[-1] + active * right)
    for rows in (2, 4):  # 1.4 is interpolated between measurements, 1.8 extrapolated along the line from plain decoding
        factor = tuner.plain_costs.at(rows)
        expected = [factor * seconds / gain for seconds, gain in zip((1.2, 1.4, 1.6, 1.8), gains[1:], strict=True)]
        assert tuner.drafters[0].seconds_per_token(rows, tuner.plain_costs, ahead=False) == pytest.approx(expected)


def test_drafts_cut_short_by_the_end_of_the_text() -> None:
    tuner = Tuner(["d"], 4)
    for proposed in ([4, 0], [1, 2], [0, 0], [0, 3]):
        tuner.choose(2)
        accepted = [min(p, 1) for p in proposed]
        tuner.observe(StepObservation(0, 2, 4, proposed, accepted, 0.1, 1.0))
    stats = tuner.stats()["drafters"]["d"]
    assert stats["drafted"] == [4, 3, 0, 0]
    assert stats["accepted"] == [4, 0, 0, 0]
    assert stats["acceptance"] == [1.0, 0.0, None, None]
    assert tuner.stats()["plain_seconds"] == {"2": 1.1}


def test_stats_are_json() -> None:
    world = World([PAIR, Draft(0.5, active=0.0)], noise=0.0)
    tuner = tuner_for(world)
    simulate(world, tuner, 2, 100)
    stats = json.loads(json.dumps(tuner.stats()))
    assert sum(stats["steps"].values()) == 100
    assert stats["plain_seconds"]["2"] == pytest.approx(world.plain(2))
    assert stats["drafters"]["d0"]["draft_seconds"]["2"] == pytest.approx(0.1 * world.forward(2))
    assert stats["drafters"]["d0"]["verify_seconds"]["4"] == pytest.approx(world.forward(4))
    assert stats["drafters"]["d0"]["acceptance"][0] == pytest.approx(0.7, abs=0.1)
    assert stats["drafters"]["d1"]["acceptance"][0] is None


def test_a_step_costs_microseconds() -> None:
    world = World([PAIR, Draft(0.5, active=0.5)])
    tuner = tuner_for(world)
    simulate(world, tuner, 4, 50)
    start = time.process_time()
    for _ in range(200):
        choice = tuner.choose(4)
        tuner.observe(StepObservation(choice.drafter, 4, choice.k, [choice.k] * 4, [0] * 4, 0.1, 1.0))
    assert (time.process_time() - start) / 200 < 1e-3


def test_max_k_is_checked() -> None:
    with pytest.raises(ValueError, match="max_k=0"):
        Tuner(["d"], 0)
