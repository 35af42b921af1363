"""Requests in, tokens out: sequences join and leave while the engine runs, and threads may share its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from genarm_fast.device.base import on_host, span
from genarm_fast.engine import pace
from genarm_fast.engine.admission import Admission
from genarm_fast.engine.config import EngineConfig
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.given import check_request, check_speculation, given_sequences, new_sequences
from genarm_fast.engine.run import Run
from genarm_fast.engine.sampler import Sampler
from genarm_fast.engine.scheduler import Scheduler
from genarm_fast.engine.sequence import Request, Sequence, members_of
from genarm_fast.engine.step import Steps
from genarm_fast.engine.turns import Turns
from genarm_fast.engine.workspace import Workspace
from genarm_fast.models.member import Member
from genarm_fast.params import AnyWeights, weights_per_arm
from genarm_fast.speculation.config import OFF, Speculation
from genarm_fast.speculation.observations import PLAIN
from genarm_fast.speculation.policy import DraftPolicy, Tuners
from genarm_fast.speculation.registry import make_drafters
from genarm_fast.speculation.shadow import TextShadows


class Engine:
    """Decodes the sequences of requests, all members together.

    All methods may be called from any thread at any time. What `add`, `abort` and `steer` ask for takes effect between
    two steps; `run` and `step` take turns.
    """

    def __init__(
        self,
        members: list[Member],
        vocab_size: int,
        config: EngineConfig,
        tuners: Tuners,
        draft_model: Member | None = None,
    ) -> None:
        everyone = [*members, *([] if draft_model is None else [draft_model])]
        self.executor = Executor(everyone, None if draft_model is None else len(members))
        self.scheduler, self.workspace = Scheduler(), Workspace(self.executor)
        self.admission = Admission(self.executor, self.scheduler, self.workspace)
        self.drafters = make_drafters(self.executor, self.executor.groups, [member.name for member in everyone])
        self.steps = Steps(self.executor, Sampler(self.executor, vocab_size), self.drafters)
        self.config, self.tuners, self.turns, self.pace = config, tuners, Turns(), pace.Pace()
        self.tokenizer = members[0].tokenizer
        self._policies: dict[tuple[Speculation, tuple[int, ...]], DraftPolicy] = {}
        self._news: dict[int, tuple[Sequence, Callable[[Sequence], None]]] = {}  # who is told that a step advanced it
        self._arm_names = [member.name for member in members[1:]]
        self._mark = object()  # of its own sequences
        self._idle = True  # no sequence is here, and nobody looked at weights and limits since

    def add(self, request: Request, speculation: str | Speculation = OFF) -> list[Sequence]:
        """Queue a request; returns its sequences, which grow in place while the engine steps.

        speculation: how to draft for it: "auto", "off" or a `Speculation`.

        Raises TypeError, ValueError for anything but a request to these members, and for a drafter that is not here.
        """
        check_request(request, len(self.executor.members), len(self._arm_names))
        names = (name for drafter in self.drafters for name in drafter.names)
        sequences = request.sequences(self.tokenizer, check_speculation(speculation, names))
        self._enqueue(sequences)
        return sequences

    def _enqueue(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.owner = self._mark
        begun = False

        def enqueue() -> None:
            nonlocal begun
            again, begun = begun, True
            self.scheduler.enqueue(sequences, again=again)

        self.turns.ask(enqueue)

    def join(self, sequences: list[Sequence], news: Callable[[Sequence], None], *, stepwise: bool = False) -> None:
        """Queue new sequences. stepwise: none goes on before its `held` is taken away.

        news: called with each that a step advanced, by the thread that steps; not with those that `abort` takes out.
        """
        for sequence in new_sequences(sequences, self._mark):
            sequence.stepwise = stepwise
            self._news[sequence.id] = sequence, news
        self._enqueue(sequences)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out; their slots are free before the next step.

        Their text stays as it is: characters held back for a stop string, or for want of their last byte, are dropped.
        Those that have ended stay as they are.

        Raises:
            TypeError, ValueError: no sequences, or those of another engine.
        """
        sequences = given_sequences(sequences, self._mark)

        def cancel() -> None:
            for sequence in sequences:
                if not sequence.ended:
                    sequence.finish_reason = "cancelled"
            self._leave(sequences)

        self.turns.ask(cancel)

    def steer(self, sequence: Sequence, weights: AnyWeights) -> None:
        """Draw a sequence's next token with other ARM weights; one that is in flight is drawn again.

        Raises:
            TypeError, ValueError: no sequence of this engine, or not one finite number or list per ARM.
        """
        given_sequences([sequence], self._mark)
        own = weights_per_arm(weights, self._arm_names, sequence.weights)

        def change() -> None:
            if not sequence.ended:
                if sequence.weights != own:
                    sequence.steer(own)
                self.scheduler.catch_up(sequence)

        self.turns.ask(change)

    def run(self, sequences: list[Sequence], *, stepwise: bool = False) -> Run:
        """Decode sequences that are new to the engine. stepwise: none goes on before its last news were taken.

        Raises:
            RuntimeError: weights lie elsewhere in memory than when they were loaded.
        """
        with self.turns.take(), on_host():
            self._begin()
        return Run(self, sequences, stepwise)

    @torch.inference_mode()
    def _begin(self) -> None:
        """Weights may have been changed in place since the last run, and limits set."""
        self.executor.refresh()
        self.scheduler.forget_prompts()
        self.admission.begin()
        if self._idle:
            self.admission.most = None  # there may be more memory than before
        self._idle = False
        if not self.scheduler and not self.workspace.allowed(self.config.cache_bytes):
            self.workspace.free()

    def step(self) -> list[Sequence]:
        """Admit waiting sequences, prefill a chunk of prompts, advance every running sequence by a token at least.

        Returns the sequences that have news: tokens, or an error; those with `ended` have left. If the step itself
        fails, all sequences that have a slot fail with it, and the engine can go on. Waits while another thread steps.
        """
        with self.turns.take():
            return self.step_in_turn()

    def step_in_turn(self) -> list[Sequence]:
        """`step`, for a thread that has the turn."""
        with torch.inference_mode(), on_host(), span("step"):
            return self._step()

    def _step(self) -> list[Sequence]:
        advanced: list[Sequence] = []
        try:
            if self._idle and self.scheduler:
                self._begin()
            expired = self.expire()
            start, rushed = pace.clock(), any(not each.held for each in self.scheduler.running)
            with span("admit"):
                advanced = self.admission.admit(self.config.max_batch_size, self.config.cache_bytes)
            try:
                tokens = self._prefill(rushed)
                if due := self.scheduler.due(self.admission.at_most(self.config.max_batch_size)):
                    advanced += self.executor.launch(self.executor.main, "decode", self._decode, due)
            except Exception as error:
                advanced += self.admission.shrink(error)
                self.steps.forget()  # which may hold logits
                tokens, rushed = 0, False
            with span("deliver"):
                self._deliver(advanced)
            if rushed:
                self.pace.observe(tokens, pace.clock() - start)
        except BaseException as error:
            self._fail(error, [each for each in advanced if each.ended])
            raise
        return [*expired, *advanced]

    def expire(self) -> list[Sequence]:
        """End those whose time is over, whether anybody reads them or not. For a thread that has the turn."""
        expired = self.scheduler.expired()
        for sequence in expired:
            sequence.finish("time")
        self._deliver(expired)
        return expired

    def _prefill(self, rushed: bool) -> int:
        """One chunk of prompts; then sequences whose prompts are complete join the running ones. Returns its tokens.

        rushed: whether others wait for their next tokens meanwhile.
        """
        most, factor = self.pace.tokens(self.config.max_step_ms) if rushed else None, 1
        if not rushed and self.admission.most is None:  # short of memory, long chunks take too much
            factor = self.executor.device.prefill_factor
        if chunk := self.scheduler.next_chunk(most, factor):
            self.executor.prefill(*chunk)
        for donor_slot, sequence in self.scheduler.copies():
            self.executor.copy(donor_slot, sequence.slot, sequence.shared, sequence.needed)
        self.scheduler.start_ready()
        return len(chunk.sequences) * chunk.width if chunk else 0

    def _decode(self, due: list[Sequence]) -> list[Sequence]:
        """One step of the sequences that are due; returns those that the host has new tokens of."""
        start, steps = time.perf_counter(), self.steps
        going = steps.going(due)
        if not going:
            return steps.drain()
        policy = self._policy(going)
        choice = policy.choose(len(going))
        most = max(each.remaining for each in going) - 1 if choice.k > 0 else 0
        if most <= 0:
            choice = PLAIN
        whole = self.executor.device.lag > 0 and steps.in_one(going, policy, choice)
        if not whole:
            choice = choice._replace(k=min(choice.k, most))
        if whole or (self.executor.device.lag and not choice.k and not any(each.request.needs_host for each in going)):
            shadows = TextShadows(policy, self.drafters, due, choice.drafter)
            before = steps.run_ahead(going, policy, choice, whole=whole)
            shadows.judge()
            if before is None:  # the first step of a row of them is not waited for
                return []
            steps.observe(before, time.perf_counter() - start)
            return before.advanced
        if steps.in_flight is not None:  # who is due, and who may draft, is only known after it
            return steps.drain()
        shadows = TextShadows(policy, self.drafters, due, choice.drafter)
        steps.run(due, policy, choice)
        shadows.judge()
        return due

    def _policy(self, due: list[Sequence]) -> DraftPolicy:
        """Who may draft: what the sequence that runs longest asks for, as far as the members run."""
        active, foreign = members_of(due), self.executor.draft_model
        able = tuple(i for i, each in enumerate(self.drafters) if {*active, foreign}.issuperset(each.members))
        key = due[0].speculation, able
        if key not in self._policies:
            names = [each.names if i in able else () for i, each in enumerate(self.drafters)]
            # A step that is one launch begins to draft when it begins.
            ahead = self.executor.device.lag > 0 and not self.steps.graph.serves(active)
            self._policies[key] = DraftPolicy(key[0], names, self.tuners, ahead=ahead)
        return self._policies[key]

    def _deliver(self, advanced: list[Sequence]) -> None:
        """Count a step, free the slots of sequences that ended in it, and tell their runs."""
        now, ended = time.perf_counter(), []
        for sequence in advanced:
            sequence.advanced = now
            sequence.steps += sequence.finish_reason != "time"  # which no step advanced
            sequence.held = sequence.stepwise
            if sequence.error is not None and sequence.slot >= 0:
                self.executor.clear(sequence.slot)
            if sequence.ended:
                ended.append(sequence)
            if sequence.id in self._news:
                self._news[sequence.id][1](sequence)
        self._leave(ended)

    def _leave(self, sequences: list[Sequence], *, everywhere: bool = False) -> None:
        self.scheduler.leave(sequences, everywhere=everywhere)
        for sequence in sequences:
            self._news.pop(sequence.id, None)
        if sequences and not self.scheduler:
            self.executor.device.finish()  # what is still running uses tensors that are about to be freed
            self.steps.forget()
            self.scheduler.forget_prompts()  # which would keep finished requests alive
            self.workspace.trim()
            self._idle = True

    def _fail(self, error: BaseException, ended: list[Sequence]) -> None:
        """A step was cut short: nobody knows what the caches hold, so all that have a slot fail.

        Sequences that the same step ended before, in `ended` or not, are told of it as well.
        """
        untold = [sequence for sequence, _ in self._news.values() if sequence.ended]
        failed = list({each.id: each for each in (*ended, *untold, *self.scheduler.placed)}.values())
        for sequence in failed:
            if not sequence.ended:
                sequence.error = RuntimeError(f"the step that decoded it failed: {type(error).__name__}: {error}")
                sequence.error.__cause__ = error
            if sequence.id in self._news:
                self._news[sequence.id][1](sequence)
        self._leave(failed, everywhere=True)
        self.steps.forget()
        self.scheduler.forget_prompts()
        if not self.scheduler.waiting:
            self.release()

    def release(self) -> None:
        """Free the KV caches, unless sequences are in them."""
        self.expire()
        if not self.scheduler.placed:
            self.workspace.free()
            self.scheduler.resize(0)
