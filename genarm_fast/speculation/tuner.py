"""Who drafts, and how many tokens: whatever settles most tokens per second, by what rounds cost and drafts were worth.

Plain decoding is one of the choices. Most of what there is to know costs nothing: what drafters would have proposed is
compared with what rounds settle, and plain rounds run their forwards anyway. The rest is tried now and then, within a
small budget of time, unless it could not win even if verification was free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log2
from typing import Any

from genarm_fast.speculation.estimates import Costs, Rate

EXPLORATION = 0.01  # of the time
REINVESTED = 0.02  # of the time that drafts have saved, for the same purpose
PATIENCE = 16, 128  # rounds before something is tried again, doubled each time that it was in vain
HOPELESS = 512  # the same for what would lose by all that is known, since costs may have changed
HOPE = 0.9  # of the best choice's time: what would need more with free verification is not tried
LOSS = 0.01  # of the time since then, before what lost so much is tried again
LOOK = 4, 8  # rounds between two looks at what a member would have proposed, with few rows and with more than FEW
FEW = 8  # a draw for 32 rows takes 0.4 % of a round, and trials of many drafts for many rows are dear
RECKON = 4  # rounds, while decoding is plain; it takes 0.1 to 0.4 ms
MARGIN = 0.98  # a new choice must need at most so much of the old one's time,
LEAVE = 0.95  # and of plain decoding's, after which rows that got ahead of others leave them behind in smaller rounds

Choice = tuple[int | None, int]  # drafter, K
PLAIN: Choice = (None, 0)


class Drafter:
    """What is known of one drafter."""

    def __init__(self, name: str, max_k: int) -> None:
        self.name = name
        self.draft, self.verify = Costs(), Costs()  # over rows; over rows · (K + 1)
        self.active = Rate()  # rows for which it proposes anything
        self.right = [Rate() for _ in range(max_k)]
        self.tries = 0  # rounds
        self.watched = 0  # rounds of others in which it was judged
        self.patience: float = PATIENCE[0]
        self.drafted = [0] * max_k  # drafts at each position after right ones, and those that were right
        self.accepted = [0] * max_k

    def acceptance(self, k: int) -> list[float]:
        found, last = [], 0.7
        for rate in self.right[:k]:
            last = rate.value(last)
            found.append(last)
        return found

    def observe(self, proposed: Sequence[int], accepted: Sequence[int], now: int) -> None:
        jumped = self.active.add(sum(map(bool, proposed)), len(proposed), now)
        for j in range(min(max(proposed), len(self.right))):
            trials = sum(p > j and a >= j for p, a in zip(proposed, accepted))
            hits = sum(a > j for a in accepted)
            jumped |= self.right[j].add(hits, trials, now)
            self.drafted[j] += trials
            self.accepted[j] += hits
        if jumped:
            self.patience = PATIENCE[0]


class Controller:
    """Chooses a drafter and K before each round and learns from it afterwards. Give the same one all rounds of a model.

    Args:
        drafters: their names. One may be a member, which then is not among what verifies its drafts.
        max_k: most drafts in a round.
        ahead: whether the next block is drafted while one is verified.
    """

    def __init__(self, drafters: Sequence[str], max_k: int, *, ahead: bool = False) -> None:
        if max_k < 1:
            raise ValueError(f"max_k={max_k}: expected an integer >= 1")
        self.max_k, self.ahead = max_k, ahead
        self.drafters = [Drafter(name, max_k) for name in drafters]
        self.plain = Costs()
        self.now = 0
        self.budget = 0.0  # seconds that may be lost in trying something
        self.choice = PLAIN  # the best as far as is known
        self.trial: Choice | None = None
        self.tried: dict[Choice, int] = {}
        self.rounds: Counter[Choice] = Counter()
        self._pace = 0.0  # seconds per token of the best choice
        self._rows = 0

    def choose(self, rows: int) -> Choice:
        """Index of the drafter and K ≥ 1, or (None, 0) for plain decoding, with this many rows."""
        self.now += 1
        same, self._rows = rows == self._rows, rows
        again, self.trial = self.trial if same else None, None
        if same and again is None and self.choice == PLAIN and self.now % RECKON:
            return PLAIN
        if not self.drafters or self.rounds[PLAIN] < 2 or not self.plain.near(rows, 1.5):
            return PLAIN
        paces = {PLAIN: self.plain.at(rows)}
        least = []
        for i, drafter in enumerate(self.drafters):
            if drafter.tries < 2 and not drafter.watched:
                return i, 1
            own, bound = self._paces(i, rows)
            paces |= {(i, k): pace for k, pace in enumerate(own, 1)}
            least.append(bound)
        self._settle_on(paces)
        self._pace = paces[self.choice]
        self.trial = again if again in paces and again != self.choice else self._due(paces, least)
        return self.trial or self.choice

    def curious(self) -> bool:
        """Whether it is time to `watch` drafters for which that takes a draw."""
        return self.now % LOOK[self._rows > FEW] == 0 or self.rounds[PLAIN] < 2

    def observe(
        self,
        drafter: int | None,
        rows: int,
        k: int,
        proposed: Sequence[int],
        accepted: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        steps: int | None = None,
    ) -> None:
        """Learn from a round.

        Args:
            drafter, k: as chosen; (None, 0) for plain decoding.
            rows: that ran.
            proposed: drafts of each row, at most k. Nothing at all: the round counts as plain decoding's cost.
            accepted: of them.
            draft_seconds: in the drafter, also where it runs once more because all drafts of a row were right.
            verify_seconds: in all else.
            steps: of the drafter in `draft_seconds`; None: of all drafts, and one more where all of a row were right.
        """
        width = max(proposed, default=0)
        seconds = draft_seconds + verify_seconds
        self.rounds[drafter, k] += 1
        self.tried[drafter, k] = self.now
        if drafter is None or width == 0:
            self.plain.add(rows, seconds)
        else:
            steps = width + any(a == width for a in accepted) if steps is None else steps
            if steps:  # else all were drafted ahead
                self.drafters[drafter].draft.add(rows, draft_seconds / steps)
            self.drafters[drafter].verify.add(rows * (1 + width), verify_seconds)
        if drafter is not None and proposed:
            self.drafters[drafter].tries += 1
            self.drafters[drafter].observe(proposed, accepted, self.now)
        tokens = 1 + sum(accepted) / rows
        plain = self.plain.at(rows) if self.plain.points else seconds
        self.budget += EXPLORATION * seconds + REINVESTED * max(tokens * plain - seconds, 0.0)
        if self.trial is not None:
            lost = min(seconds - tokens * self._pace, plain)  # more than that is the machine's doing
            self.budget -= lost
            if drafter is not None:
                each = self.drafters[drafter]
                longer = max(min(2 * each.patience, PATIENCE[1]), lost / (LOSS * plain))
                each.patience = longer if lost > 0 else PATIENCE[0]
            if lost > 0:  # else it is tried again at once
                self.trial = None

    def watch(
        self, drafter: int, proposed: Sequence[int], accepted: Sequence[int], seconds: float | None = None
    ) -> None:
        """Learn from drafts that were not used, in a round of another drafter or of none.

        An n-gram's cost nothing. A member's first one takes no more than a draw, since its logits are part of the
        target.

        Args:
            drafter: whose they are.
            proposed: of each row, as many as can be judged: not more than the round settled.
            accepted: of them, those that came true.
            seconds: what one draft of every row took, with the forward that the round needed anyway.
        """
        if not proposed:
            return
        self.drafters[drafter].watched += 1
        self.drafters[drafter].observe(proposed, accepted, self.now)
        if seconds is not None:
            self.drafters[drafter].draft.add(len(proposed), seconds)

    def stats(self) -> dict[str, Any]:
        """What was measured and chosen so far, for JSON. Costs are {tokens in the forward: seconds}."""

        def table(costs: Costs) -> dict[str, float]:
            return {f"{tokens:.3g}": seconds for tokens, seconds in costs.points}

        return {
            "rounds": {
                "plain" if i is None else f"{self.drafters[i].name}, k={k}": count
                for (i, k), count in sorted(self.rounds.items(), key=lambda item: (item[0][0] is not None, item[0]))
            },
            "plain_seconds": table(self.plain),
            "drafters": {
                each.name: {
                    "drafted": each.drafted,
                    "accepted": each.accepted,
                    "acceptance": [a / d if d else None for a, d in zip(each.accepted, each.drafted)],
                    "draft_seconds": table(each.draft),
                    "verify_seconds": table(each.verify),
                }
                for each in self.drafters
            },
        }

    def _paces(self, i: int, rows: int) -> tuple[list[float], float]:
        """Expected seconds per token with 1, 2, ... drafts of drafter i, up to twice the size that was measured.

        And the least that any number of drafts could take by what is known.
        """
        drafter, plain = self.drafters[i], self.plain.at(rows)
        draft, largest = 0.0, float(rows)
        if drafter.draft.points:  # else it had nothing to say yet
            measured, draft = min(drafter.draft.points, key=lambda point: abs(log2(point[0] / rows)))
            draft *= plain / self.plain.at(measured)
        if drafter.verify.points:
            largest = max(largest, drafter.verify.points[-1][0])
        known = (float(rows), max(plain - draft, plain / 4))  # a member does not verify its own drafts
        active = drafter.active.value(1.0)
        idle = (1 - active) ** rows  # chance that nothing is proposed to any row
        paces, least = [], plain
        sure = False
        all_right = gain = 1.0
        rates = drafter.acceptance(self.max_k)
        for k, acceptance in enumerate(rates, 1):
            tokens = rows * (k + 1)
            all_right *= acceptance
            gain += active * all_right
            missing = k * (1 - (all_right * rates[0]) ** rows) if self.ahead else k + 1 - (1 - all_right) ** rows
            drafting = draft * missing
            verify = min(drafter.verify.at(tokens, known), (k + 1) * known[1])  # more was held up
            if not drafter.verify.near(tokens, 1.5) and self.plain.near(tokens, 1.2):  # as so many rows
                verify = max(self.plain.at(tokens) * (1 - draft / plain), known[1])
            sure = sure or drafter.verify.near(tokens, 1.3, 2)  # and what is longer does not get cheaper by the token
            expected, bound = (
                (idle * plain + (1 - idle) * (drafting + each)) / gain
                for each in (verify, verify if sure else known[1])
            )
            least = min(least, bound)
            if tokens <= 2.1 * largest:
                paces.append(expected)
        return paces, least

    def _settle_on(self, paces: dict[Choice, float]) -> None:
        best = min(paces, key=paces.__getitem__)
        old = paces.get(self.choice)
        if old is None or best == PLAIN or paces[best] < (LEAVE if self.choice == PLAIN else MARGIN) * old:
            self.choice = best

    def _due(self, paces: dict[Choice, float], least: Sequence[float]) -> Choice | None:
        """What to try instead of the best choice, if there is time for it."""
        drafter, k = self.choice
        near = (PLAIN, (drafter, k - 1), (drafter, k + 1))
        due: dict[Choice, float] = {
            c: self.tried.get(c, 0) + PATIENCE[0] for c in near if c in paces and c != self.choice
        }
        for i, each in enumerate(self.drafters):
            if i != drafter:
                own = [choice for choice in paces if choice[0] == i]
                bound = (1.2 if self._rows <= FEW else 1.0) * min(paces[choice] for choice in own)
                longest = max(choice for choice in own if paces[choice] <= bound)  # tells most
                hopeless = each.watched and least[i] > HOPE * self._pace
                last = max((when for (j, _), when in self.tried.items() if j == i), default=-each.patience)
                due[longest] = last + (HOPELESS if hopeless else each.patience)
        for choice, when in sorted(due.items(), key=lambda item: item[1]):
            if self.now >= when and paces[choice] - self._pace <= self.budget:
                return choice
        return None
