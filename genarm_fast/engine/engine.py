"""The engine: it decodes sequences, which join and leave while it runs, and several threads may share its steps."""

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
    """Decodes the sequences of requests with all members.

    All methods may be called from any thread at any time. `add`, `abort` and `steer` take effect between two steps;
    `run` and `step` wait while another thread steps.
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
        self._news: dict[int, tuple[Sequence, Callable[[Sequence], None]]] = {}  # callbacks of `join` by sequence id
        self._arm_names = [member.name for member in members[1:]]
        self._mark = object()  # `owner` of this engine's sequences
        self._idle = True  # whether all sequences have left, and `_begin` has not run since

    def add(self, request: Request, speculation: str | Speculation = OFF) -> list[Sequence]:
        """Queue a request. Returns its sequences, which grow in place while the engine steps.

        speculation: how to draft for the request: "auto", "off" or a `Speculation`.

        Raises TypeError, ValueError: not a request that was made for these members, or an unknown drafter.
        """
        check_request(request, len(self.executor.members), len(self._arm_names))
        names = (name for drafter in self.drafters for name in drafter.names)
        sequences = request.sequences(self.tokenizer, check_speculation(speculation, names))
        self._enqueue(sequences)
        return sequences

    def _enqueue(self, sequences: list[Sequence]) -> None:
        """Queue sequences between two steps. If an interrupt comes in the middle, they are queued again, not twice."""
        for sequence in sequences:
            sequence.owner = self._mark
        begun = False

        def enqueue() -> None:
            nonlocal begun
            again, begun = begun, True
            self.scheduler.enqueue(sequences, again=again)

        self.turns.do_between_steps(enqueue)

    def join(self, sequences: list[Sequence], news: Callable[[Sequence], None], *, stepwise: bool = False) -> None:
        """Queue new sequences. stepwise: each is held after every step, until its reader sets `held` to False.

        news: called with each sequence that a step advanced, by the thread that steps; not for those that `abort` ends.
        """
        for sequence in new_sequences(sequences, self._mark):
            sequence.stepwise = stepwise
            self._news[sequence.id] = sequence, news
        self._enqueue(sequences)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out; their slots are free before the next step. Sequences that have ended do not change.

        The text stays as it is. Characters that were held back are dropped: those that may begin a stop string, and
        those whose last byte is missing.

        Raises TypeError, ValueError: not a list of sequences, or sequences of another engine.
        """
        sequences = given_sequences(sequences, self._mark)

        def cancel() -> None:
            for sequence in sequences:
                if not sequence.ended:
                    sequence.finish_reason = "cancelled"
            self._leave(sequences)

        self.turns.do_between_steps(cancel)

    def steer(self, sequence: Sequence, weights: AnyWeights) -> None:
        """Draw a sequence's next token with other ARM weights. A token that is in flight is dropped and drawn again.

        Raises TypeError, ValueError: not a sequence of this engine, or not one finite number or list per ARM.
        """
        given_sequences([sequence], self._mark)
        own = weights_per_arm(weights, self._arm_names, sequence.weights)

        def change() -> None:
            if not sequence.ended:
                if sequence.weights != own:
                    sequence.steer(own)
                self.scheduler.catch_up(sequence)

        self.turns.do_between_steps(change)

    def run(self, sequences: list[Sequence], *, stepwise: bool = False) -> Run:
        """Decode sequences that are new to the engine. stepwise: each goes on only after its last news were taken.

        Raises RuntimeError: weights were moved in memory after they were loaded.
        """
        with self.turns.take(), on_host():
            self._begin()
        return Run(self, sequences, stepwise)

    @torch.inference_mode()
    def _begin(self) -> None:
        """Begin a run: notice changes of weights and limits since the last one."""
        self.executor.refresh()
        self.scheduler.forget_prompts()
        self.admission.begin()
        if self._idle:
            self.admission.reduced_batch_size = None  # no sequence is here, so there may be more memory than before
        self._idle = False
        if not self.scheduler and not self.workspace.is_within_limit(self.config.cache_bytes):
            self.workspace.free()

    def step(self) -> list[Sequence]:
        """Admit waiting sequences, prefill one chunk of prompts, and advance the running sequences by a token or more.

        Returns the sequences that have new tokens or an error; those that have `ended` have left. If the step itself
        fails, all sequences that have a slot fail, and the engine can go on. Waits while another thread steps.
        """
        with self.turns.take():
            return self.step_in_turn()

    def step_in_turn(self) -> list[Sequence]:
        """Do as `step`, for a thread that has the turn."""
        with torch.inference_mode(), on_host(), span("step"):
            return self._step()

    def _step(self) -> list[Sequence]:
        """Do the work of `step`. After an error of the decoding, fewer sequences run together, or all fail."""
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
                if due := self.scheduler.due(self.admission.allowed_batch_size(self.config.max_batch_size)):
                    advanced += self.executor.launch(self.executor.main, "decode", self._decode, due)
            except Exception as error:
                advanced += self.admission.shrink(error)
                self.steps.forget()  # frees logits and other tensors of the failed step
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
        """End sequences whose time is over, held ones too, and return them. For a thread that has the turn."""
        expired = self.scheduler.expired()
        for sequence in expired:
            sequence.finish("time")
        self._deliver(expired)
        return expired

    def _prefill(self, rushed: bool) -> int:
        """Prefill one chunk of prompts, and let sequences run whose prompts are complete. Returns the chunk's tokens.

        rushed: whether running sequences wait for their next tokens meanwhile.
        """
        most, factor = self.pace.tokens(self.config.max_step_ms) if rushed else None, 1
        if not rushed and self.admission.reduced_batch_size is None:  # chunks stay short after a shortage of memory
            factor = self.executor.device.prefill_factor
        if chunk := self.scheduler.next_chunk(most, factor):
            self.executor.prefill(*chunk)
        for donor_slot, sequence in self.scheduler.copies():
            self.executor.copy(donor_slot, sequence.slot, sequence.shared, sequence.needed)
        self.scheduler.start_ready()
        return len(chunk.sequences) * chunk.width if chunk else 0

    def _decode(self, due: list[Sequence]) -> list[Sequence]:
        """Decode one step of the sequences that are due. Returns the sequences whose new tokens the host has read."""
        start, steps, lag = time.perf_counter(), self.steps, self.executor.device.lag
        continuing = steps.continuing(due)
        if not continuing:
            return steps.drain()
        policy = self._policy(continuing)
        choice = policy.choose(len(continuing))
        most = max(each.remaining for each in continuing) - 1 if choice.k > 0 else 0
        if most <= 0:
            choice = PLAIN
        one_launch = lag > 0 and steps.fits_one_launch(continuing, policy, choice)
        if not one_launch:
            choice = choice._replace(k=min(choice.k, most))
        if one_launch or (lag and not choice.k and not any(each.request.needs_host for each in continuing)):
            shadows = TextShadows(policy, self.drafters, due, choice.drafter)
            before = steps.run_ahead(continuing, policy, choice, one_launch=one_launch)
            shadows.judge()
            if before is None:  # this step is in flight and there was none before it, so there is nothing to read
                return []
            steps.observe(before, time.perf_counter() - start)
            return before.advanced
        if steps.in_flight is not None:  # its tokens decide which sequences are due and how many drafts fit
            return steps.drain()
        shadows = TextShadows(policy, self.drafters, due, choice.drafter)
        steps.run(due, policy, choice)
        shadows.judge()
        return due

    def _policy(self, due: list[Sequence]) -> DraftPolicy:
        """Return the draft policy of these sequences: that of the first one, with the drafters whose members run."""
        active, draft_model = members_of(due), self.executor.draft_model
        able = tuple(i for i, each in enumerate(self.drafters) if {*active, draft_model}.issuperset(each.members))
        key = due[0].speculation, able
        if key not in self._policies:
            names = [each.names if i in able else () for i, each in enumerate(self.drafters)]
            # Members draft the next block during verification, but not if a step is one launch: it drafts for itself.
            ahead = self.executor.device.lag > 0 and not self.steps.graph.can_capture(active)
            self._policies[key] = DraftPolicy(key[0], names, self.tuners, ahead=ahead)
        return self._policies[key]

    def _deliver(self, advanced: list[Sequence]) -> None:
        """Count a step, tell readers of the sequences that it advanced, and free the slots of those that ended."""
        now, ended = time.perf_counter(), []
        for sequence in advanced:
            sequence.advanced = now
            sequence.steps += sequence.finish_reason != "time"  # a sequence whose time is over was not in the step
            sequence.held = sequence.stepwise
            if sequence.error is not None and sequence.slot >= 0:
                self.executor.clear(sequence.slot)
            if sequence.ended:
                ended.append(sequence)
            if sequence.id in self._news:
                self._news[sequence.id][1](sequence)
        self._leave(ended)

    def _leave(self, sequences: list[Sequence], *, everywhere: bool = False) -> None:
        """Free the slots of sequences; once none is here, end the run: drop its state and trim the caches."""
        self.scheduler.leave(sequences, everywhere=everywhere)
        for sequence in sequences:
            self._news.pop(sequence.id, None)
        if sequences and not self.scheduler:
            self.executor.device.finish()  # work that still runs uses tensors that are freed next
            self.steps.forget()
            self.scheduler.forget_prompts()  # they would keep finished requests alive
            self.workspace.trim()
            self._idle = True

    def _fail(self, error: BaseException, ended: list[Sequence]) -> None:
        """Fail all sequences that have a slot after a step was cut short, since the caches may hold anything.

        Readers of sequences that the same step had ended before, listed in `ended` or not, are told as well.
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
