"""The controller on simulated rounds whose costs and acceptance are known."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field

import pytest

from genarm_fast.controller import PLAIN, Choice, Controller
from genarm_fast.estimates import best_k, expected_speedup, expected_tokens

MAX_K = 8
SPIKE = 0.05  # share of forwards that something else on the machine holds up


@dataclass
class Draft:
    """cost: of a token, in units of a plain one-row forward. member: the target needs its forward too."""

    acceptance: float
    cost: float = 0.0
    active: float = 1.0
    member: bool = False


@dataclass
class World:
    """A forward of n tokens takes 1 + slope · (n - 1), times `rest` for all that is no drafter."""

    drafts: list[Draft]
    slope: float = 0.03
    rest: float = 1.0
    noise: float = 0.05
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def forward(self, tokens: float) -> float:
        return 1 + self.slope * (tokens - 1)

    def drafting(self, i: int, rows: int) -> float:
        return self.drafts[i].cost * self.forward(rows)

    def verifying(self, tokens: int, drafter: int | None = None) -> float:
        """All members' forwards, but for the drafter's."""
        members = (each.cost for j, each in enumerate(self.drafts) if each.member and j != drafter)
        return self.forward(tokens) * (self.rest + sum(members))

    def timed(self, seconds: float) -> float:
        spike = 4.0 if self.noise and self.random.random() < SPIKE else 1.0
        return seconds * spike * self.random.lognormvariate(0.0, self.noise)

    def plain(self, rows: int) -> float:
        return self.verifying(rows)

    def drafts_of(self, i: int, counts: list[int]) -> tuple[list[int], list[int]]:
        """Drafts proposed and accepted where so many are asked of each row."""
        draft = self.drafts[i]
        proposed = [count if self.random.random() < draft.active else 0 for count in counts]
        accepted = []
        for each in proposed:
            right = 0
            while right < each and self.random.random() < draft.acceptance:
                right += 1
            accepted.append(right)
        return proposed, accepted

    def round(self, controller: Controller, choice: Choice, rows: int) -> None:
        """One round, observed."""
        i, k = choice
        proposed, accepted = self.drafts_of(i or 0, [k] * rows) if self.drafts else ([0] * rows, [0] * rows)
        for j, draft in enumerate(self.drafts):
            if j != i and not draft.cost:
                controller.watch(j, *self.drafts_of(j, [1 + a for a in accepted]))
            elif j != i and draft.member and controller.curious():
                forward = self.timed(self.drafting(j, rows)) if i is None else None
                controller.watch(j, *self.drafts_of(j, [1] * rows), forward)
        if i is None:
            controller.observe(None, rows, 0, proposed, accepted, 0.0, self.timed(self.plain(rows)))
            return
        width = max(proposed)
        bonus = any(a == width for a in accepted)
        drafting = self.drafting(i, rows) * (width + bonus)
        verifying = self.verifying(rows * (1 + width), i)
        if not width:
            drafting, verifying = 0.0, self.plain(rows)
        controller.observe(i, rows, k, proposed, accepted, self.timed(drafting), self.timed(verifying))

    def gain(self, choice: Choice) -> float:
        """Expected tokens per row of a round."""
        i, k = choice
        if i is None:
            return 1.0
        draft = self.drafts[i]
        return 1 + draft.active * (expected_tokens([draft.acceptance] * k) - 1)

    def pace(self, choice: Choice, rows: int) -> float:
        """Expected seconds per token."""
        i, k = choice
        if i is None:
            return self.plain(rows)
        draft = self.drafts[i]
        idle = (1 - draft.active) ** rows
        full = draft.acceptance**k
        busy = self.drafting(i, rows) * (k + 1 - (1 - full) ** rows) + self.verifying(rows * (k + 1), i)
        return (idle * self.plain(rows) + (1 - idle) * busy) / self.gain(choice)

    def best(self, rows: int) -> Choice:
        choices = [PLAIN, *((i, k) for i in range(len(self.drafts)) for k in range(1, MAX_K + 1))]
        return min(choices, key=lambda choice: self.pace(choice, rows))


def make(world: World) -> Controller:
    return Controller([f"d{i}" for i in range(len(world.drafts))], MAX_K)


def simulate(world: World, controller: Controller, rows: int, rounds: int) -> float:
    """What the rounds' choices cost per token, relative to the best choice: 1.0 is perfect."""
    seconds = tokens = 0.0
    for _ in range(rounds):
        choice = controller.choose(rows)
        world.round(controller, choice, rows)
        tokens += world.gain(choice)
        seconds += world.gain(choice) * world.pace(choice, rows)
    return seconds / tokens / world.pace(world.best(rows), rows)


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
        controller = make(world)
        simulate(world, controller, rows, 60)
        found.append(simulate(world, controller, rows, 400))
    best = world.pace(world.best(rows), rows) / world.pace(PLAIN, rows)
    assert best * max(found) < 1.03
    assert sum(found) / len(found) < 1.06


REAL = [Draft(0.5, cost=0.1, member=True), Draft(0.3, active=0.1), Draft(0.5, cost=1.0, member=True)]


def loss_of_a_new_model(rows: int, slope: float) -> float:
    """Seconds per token over plain decoding's, of a small ARM, n-grams and their base from the first round on."""
    found = []
    for seed in range(5):
        world = World(REAL, slope=slope, rest=0.05, random=random.Random(seed))
        found.append(simulate(world, make(world), rows, 64) * world.pace(world.best(rows), rows))
    return sum(found) / len(found) / world.pace(PLAIN, rows)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
def test_drafts_that_lose_are_hardly_tried(rows: int) -> None:
    """A CPU's slope (docs/speculation.md) and worse ones. In one call of 64 tokens."""
    for slope in (0.06, 0.1, 0.3):
        assert loss_of_a_new_model(rows, slope) < 1.03


def test_drafts_are_tried_where_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Controller, "watch", lambda *_: None)
    assert loss_of_a_new_model(32, 0.06) > 1.04


def test_what_could_not_win_with_free_verification_is_hardly_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def tries() -> int:
        world = World([Draft(0.1, cost=0.5, member=True)])
        controller = make(world)
        simulate(world, controller, 8, 1500)
        return controller.drafters[0].tries

    assert tries() <= 3
    monkeypatch.setattr("genarm_fast.controller.HOPE", 100.0)
    assert tries() > 8


@pytest.mark.parametrize("rows", [1, 8])
def test_warm_up_is_short(rows: int) -> None:
    world = World([Draft(0.9, cost=0.05, member=True), Draft(0.1, cost=0.5)])
    controller = make(world)
    simulate(world, controller, rows, 15)
    assert simulate(world, controller, rows, 30) < 1.2


REPEATS = {False: Draft(0.2, active=0.05), True: Draft(0.95, active=0.95)}


@pytest.mark.parametrize("alone", [True, False], ids=["n-gram alone", "beside a small ARM"])
def test_a_text_that_starts_and_stops_to_repeat_its_prompt(alone: bool) -> None:
    others = [] if alone else [PAIR]
    worlds = {repeats: World([draft, *others]) for repeats, draft in REPEATS.items()}
    controller = make(worlds[False])
    simulate(worlds[False], controller, 1, 300)
    assert simulate(worlds[False], controller, 1, 100) < 1.15
    simulate(worlds[True], controller, 1, 80)
    assert simulate(worlds[True], controller, 1, 100) < 1.2
    simulate(worlds[False], controller, 1, 30)
    assert simulate(worlds[False], controller, 1, 100) < 1.15


def test_without_trials_the_change_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm_fast.controller.EXPLORATION", 0.0)
    monkeypatch.setattr("genarm_fast.controller.REINVESTED", 0.0)
    monkeypatch.setattr(Controller, "watch", lambda *_: None)
    controller = make(World([REPEATS[False], PAIR]))
    simulate(World([REPEATS[False], PAIR]), controller, 1, 300)
    simulate(World([REPEATS[True], PAIR]), controller, 1, 80)
    assert simulate(World([REPEATS[True], PAIR]), controller, 1, 100) > 1.5


def test_a_machine_that_slows_down_for_a_while() -> None:
    world = World([Draft(0.6, cost=0.2, member=True)])
    controller = make(world)
    simulate(world, controller, 1, 200)
    slow = World(world.drafts)
    slow.timed = lambda seconds: 2 * world.timed(seconds)  # type: ignore[method-assign]
    assert simulate(slow, controller, 1, 60) < 1.1
    assert simulate(world, controller, 1, 60) < 1.1


def test_forwards_that_are_held_up_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike with the latest timing alone."""

    def regret() -> float:
        found = []
        for seed in range(5):
            world = World([PAIR], noise=0.3, random=random.Random(seed))
            controller = make(world)
            simulate(world, controller, 8, 60)
            found.append(simulate(world, controller, 8, 200) - 1)
        return sum(found) / len(found)

    robust = regret()
    assert robust < 0.06
    monkeypatch.setattr("genarm_fast.estimates.SAMPLES", 1)
    assert regret() > 1.5 * robust


def test_rows_that_end_one_by_one() -> None:
    world = World([PAIR], slope=0.1)
    controller = make(world)
    lost = {rows: simulate(world, controller, rows, 20) for rows in (*range(32, 0, -1), *range(32, 0, -1))}
    assert max(lost.values()) < 1.3
    assert sum(lost.values()) / len(lost) < 1.06


@dataclass
class Ahead(World):
    """The next block is there if all drafts of a round were right, and the guess of the token after them."""

    there: bool = False

    def round(self, controller: Controller, choice: Choice, rows: int) -> None:
        i, k = choice
        if i is None:
            return super().round(controller, choice, rows)
        accepted = self.drafts_of(i, [k + 1] * rows)[1]
        steps, self.there = 0 if self.there else k, min(accepted) > k
        drafting, verifying = steps * self.drafting(i, rows), self.verifying(rows * (k + 1), i)
        found = [min(each, k) for each in accepted]
        controller.observe(i, rows, k, [k] * rows, found, self.timed(drafting), self.timed(verifying), steps)

    def pace(self, choice: Choice, rows: int) -> float:
        i, k = choice
        if i is None:
            return super().pace(choice, rows)
        missing = k * (1 - self.drafts[i].acceptance ** ((k + 1) * rows))
        return (self.drafting(i, rows) * missing + self.verifying(rows * (k + 1), i)) / self.gain(choice)


@pytest.mark.parametrize("rows", [1, 4])
def test_drafts_ahead_are_reckoned_with(rows: int) -> None:
    lost = {True: 0.0, False: 0.0}
    for ahead in lost:
        for seed in range(3):
            world = Ahead([Draft(0.8, cost=0.5, member=True)], random=random.Random(seed))
            controller = Controller(["d0"], MAX_K, ahead=ahead)
            simulate(world, controller, rows, 60)
            lost[ahead] += simulate(world, controller, rows, 300) / 3
    assert lost[True] < 1.06
    assert lost[True] < lost[False] - 0.01


def test_the_same_rounds_give_the_same_choices() -> None:
    def choices() -> list[Choice]:
        world = World([PAIR, Draft(0.5, active=0.5)], random=random.Random(3))
        controller = make(world)
        made = []
        for _ in range(200):
            made.append(controller.choose(2))
            world.round(controller, made[-1], 2)
        return made

    assert choices() == choices()
    assert len(set(choices())) > 4


def test_without_drafters_it_is_plain_decoding() -> None:
    world = World([])
    controller = make(world)
    assert simulate(world, controller, 3, 20) == pytest.approx(1.0)
    assert controller.stats()["rounds"] == {"plain": 20}


def test_drafts_cut_short_by_the_end_of_the_text() -> None:
    controller = Controller(["d"], 4)
    for proposed in ([4, 0], [1, 2], [0, 0], [0, 3]):
        controller.choose(2)
        controller.observe(0, 2, 4, proposed, [min(p, 1) for p in proposed], 0.1, 1.0)
    stats = controller.stats()["drafters"]["d"]
    assert stats["drafted"] == [4, 3, 0, 0]
    assert stats["accepted"] == [4, 0, 0, 0]
    assert stats["acceptance"] == [1.0, 0.0, None, None]
    assert controller.stats()["plain_seconds"] == {"2": 1.1}


def test_stats_are_json() -> None:
    world = World([PAIR, Draft(0.5, active=0.0)], noise=0.0)
    controller = make(world)
    simulate(world, controller, 2, 100)
    stats = json.loads(json.dumps(controller.stats()))
    assert sum(stats["rounds"].values()) == 100
    assert stats["plain_seconds"]["2"] == pytest.approx(world.plain(2))
    assert stats["drafters"]["d0"]["draft_seconds"]["2"] == pytest.approx(0.1 * world.forward(2))
    assert stats["drafters"]["d0"]["verify_seconds"]["4"] == pytest.approx(world.forward(4))
    assert stats["drafters"]["d0"]["acceptance"][0] == pytest.approx(0.7, abs=0.1)
    assert stats["drafters"]["d1"]["acceptance"][0] is None


def test_a_round_costs_microseconds() -> None:
    world = World([PAIR, Draft(0.5, active=0.5)])
    controller = make(world)
    simulate(world, controller, 4, 50)
    start = time.process_time()
    for _ in range(200):
        choice = controller.choose(4)
        controller.observe(*choice[:1], 4, choice[1], [choice[1]] * 4, [0] * 4, 0.1, 1.0)
    assert (time.process_time() - start) / 200 < 1e-3


def test_max_k_is_checked() -> None:
    with pytest.raises(ValueError, match="max_k=0"):
        Controller(["d"], 0)


@pytest.mark.parametrize(("cost", "acceptance", "k", "expected"), [(0.1, 0.8, 0, 1.0), (1.0, 0.0, 1, 1.0)])
def test_model_where_it_is_plain(cost: float, acceptance: float, k: int, expected: float) -> None:
    assert expected_speedup(cost, acceptance, k) == pytest.approx(expected)


def test_model_of_the_design() -> None:
    assert expected_tokens([0.5] * 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    assert expected_speedup(0.1, 0.8, 6) == pytest.approx(1.1 * 3.951424 / (0.1 * (6 + 0.8**6) + 1))
    assert best_k(0.1, 0.8, 16) == 6  # table of the design: 2.7 there
    assert best_k(0.3, 0.0, 16) == 0


def test_model_is_what_simulated_rounds_cost() -> None:
    world = World([Draft(0.8, cost=0.15, member=True)], slope=0.0)
    for k in range(6):
        choice = (0, k) if k else PLAIN
        assert world.pace(PLAIN, 1) / world.pace(choice, 1) == pytest.approx(expected_speedup(0.15, 0.8, k))
