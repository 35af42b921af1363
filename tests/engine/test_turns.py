"""Threads that share one engine: which thread steps, what is done between steps, and the state after an interrupt."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late

import pytest
from doubles import Lagging, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.run import Run
from genarm_fast.engine.turns import Turns
from genarm_fast.speculation.config import OFF, Speculation

SEEDED = {"max_new_tokens": 6, "ignore_eos": True, "seed": 1}


@pytest.fixture
def model(tokenizer):
    return GenARM.from_pretrained(build_model("llama", 0), build_model("llama", 1), tokenizer=tokenizer)


def sequences_of(model, prompt, **params):
    (request,) = model.prepare([prompt], SamplingParams(**{**SEEDED, **params}))
    return request.sequences(model.tokenizer, OFF)


def within_seconds(function, seconds=20):
    """Return the function's result from another thread; fail instead of hanging."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result(seconds)
    except Late:
        pytest.fail(f"it did not end within {seconds} s")
    finally:
        pool.shutdown(wait=False)


def test_turns_come_in_the_order_of_asking():
    """The order holds also for a thread that has just stepped and wants to step again at once."""
    turns, order = Turns(), []

    def wait(name):
        with turns.take():
            order.append(name)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(3)]
    with turns.take():
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._queue) < count:
                pass
    wait("again")
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, "again"]


def test_what_is_asked_in_mid_step_is_done_after_it():
    turns, done = Turns(), []
    with turns.take():
        within_seconds(lambda: turns.do_between_steps(lambda: done.append("abort")))
        assert not done
    assert done == ["abort"]
    turns.do_between_steps(lambda: done.append("at once"))
    assert done == ["abort", "at once"]


def test_a_step_within_a_step_is_refused():
    turns = Turns()
    with turns.take(), pytest.raises(RuntimeError, match="in the middle of a step of this thread"), turns.take():
        pass


def test_an_interrupt_while_taking_the_turn_gives_it_back(model):
    """Ctrl-C may come while the thread runs a request's work between steps."""
    turns, calls = model.engine().turns, []

    def interrupt():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    turns._jobs.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate([5, 6], **SEEDED)
    assert len(calls) == 2  # the interrupted call is repeated, whole
    assert within_seconds(lambda: model.generate([5, 6], **SEEDED)[0].token_ids)


def test_an_abort_in_mid_step_waits_for_its_end(model):
    """This holds also for an engine that its user steps by hand."""
    engine, seen = model.engine(), []

    def abort(input_ids, scores):
        if not seen:
            within_seconds(lambda: engine.abort([other]))
            seen.append((other.slot, other in engine.scheduler.running))
        return scores

    engine.add(model.prepare([[5, 6, 7]], SamplingParams(**SEEDED, logits_processors=[abort]))[0])
    (other,) = engine.add(model.prepare([[5, 6, 8]], SamplingParams(**SEEDED))[0])
    while engine.scheduler:
        engine.step()
    assert seen == [(1, True)]
    assert (other.slot, other.finish_reason, len(other.tokens)) == (-1, "cancelled", 1)


def test_an_end_is_told_before_a_run_is_over(model, monkeypatch):
    """Another thread's step ends the sequence and tells its run a moment later."""
    deliver, ended, told = Engine._deliver, threading.Event(), threading.Event()

    def late(self, advanced):
        if any(each.ended for each in advanced):
            ended.set()
            told.wait(0.2)  # long enough for the run to look
        deliver(self, advanced)

    monkeypatch.setattr(Engine, "_deliver", late)
    engine = model.engine()
    (request,) = model.prepare([[5, 6]], max_new_tokens=1, seed=1)
    sequences = request.sequences(model.tokenizer, OFF)
    run = engine.run(sequences)
    stepper = threading.Thread(target=engine.step)
    stepper.start()
    ended.wait()
    assert sequences[0].ended
    assert next(run) == sequences
    told.set()
    stepper.join()


def test_a_run_whose_sequence_is_aborted_ends(model):
    engine = model.engine()
    run = engine.run(sequences_of(model, [5, 6, 7], n=2))
    next(run)
    engine.abort([run.sequences[1]])
    within_seconds(lambda: list(run))
    assert [sequence.finish_reason for sequence in run.sequences] == ["length", "cancelled"]


def test_an_interrupted_step_leaves_nobody_waiting(model, monkeypatch):
    """Ctrl-C also reaches the thread that steps for others, just when it would deliver their tokens."""
    engine = model.engine()
    other = engine.run(sequences_of(model, [5, 6, 7], max_new_tokens=3))
    deliver, calls = engine._deliver, []

    def interrupted(advanced):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        deliver(advanced)

    monkeypatch.setattr(engine, "_deliver", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate([8, 9], **SEEDED)
    within_seconds(lambda: list(other))
    assert other.sequences[0].ended
    assert not engine.scheduler


def test_a_close_that_is_interrupted_can_be_repeated(model, monkeypatch):
    engine = model.engine()
    run = engine.run(sequences_of(model, [5, 6, 7]))
    next(run)
    abort = engine.abort

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "abort", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.close()
    monkeypatch.setattr(engine, "abort", abort)
    run.close()
    assert not engine.scheduler


def test_a_run_that_was_interrupted_as_it_was_made_ends_in_silence():
    """Python calls `__del__` of an object without attributes, and prints what `__del__` raises."""
    Run.__new__(Run).__del__()


def test_a_late_reader_gets_each_token_once(model):
    """Several steps went by before the reader came; it gets their tokens as one chunk."""
    with engines_on(Lagging()):
        stream = model.stream([5, 6, 7], **{**SEEDED, "max_new_tokens": 2})
        engine = model.engine()
        run = engine.run(sequences_of(model, [8, 9], max_new_tokens=9))
        for _ in range(5):
            engine.step()
        chunks = list(stream)
        run.close()
    assert sum(len(chunk.token_ids) for chunk in chunks) == 2
    assert [chunk.finish_reason for chunk in chunks][-1:] == ["length"]
    assert all(chunk.token_ids for chunk in chunks)


def test_nothing_of_a_call_is_kept(model):
    """The engine keeps neither what a request held nor drafts of a stream that was closed."""

    class Processor:
        def __call__(self, input_ids, scores):
            return scores

    processor = Processor()
    alive = weakref.ref(processor)
    model.generate([5, 6, 7], **SEEDED, logits_processors=[processor])
    del processor
    gc.collect()
    assert alive() is None
    sure = GenARM.from_pretrained(build_model("llama", 0), build_model("llama", 0), tokenizer=model.tokenizer)
    with engines_on(Lagging(whole_steps=False)):
        stream = sure.stream([5, 6, 7], **SEEDED, temperature=0.0, speculation=Speculation("arm", 2))
        next(stream)
        drafter = sure.engine().drafters[0]
        assert drafter.rollout is not None  # drafts are ahead, since all drafts are right
        stream.close()
        assert drafter.rollout is None


def test_limits_and_weights_are_looked_at_by_steps_alone(tokenizer):
    """An engine that never makes a run checks limits and weights whenever it is idle before a request comes."""
    base = build_model("llama", 0)
    model = GenARM.from_pretrained(base, build_model("llama", 1), tokenizer=tokenizer)

    def decode():
        engine = model.engine()
        (sequence,) = engine.add(model.prepare([[5, 6, 7]], SamplingParams(**SEEDED))[0])
        while engine.scheduler:
            engine.step()
        return sequence.tokens

    before = decode()
    base.model.layers[0].mlp.up_proj.weight.data.mul_(-2.0)
    fresh = GenARM.from_pretrained(base, build_model("llama", 1), tokenizer=tokenizer)
    assert decode() == fresh.generate([5, 6, 7], **SEEDED)[0].token_ids != before
    weight = base.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="was moved"):
        decode()


def test_an_interrupt_while_the_turn_is_given_back_leaves_it_free(monkeypatch):
    """The soak test found this fault: all other threads waited forever."""
    turns = Turns()
    with monkeypatch.context() as patch:
        notify, calls = turns._changed.notify_all, []

        def interrupted():
            calls.append(None)
            if len(calls) == 2:  # the first call belongs to taking the turn
                raise KeyboardInterrupt
            notify()

        patch.setattr(turns._changed, "notify_all", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.take():
            pass
    assert turns._stepper is None
    taken = []
    thread = threading.Thread(target=lambda: turns.do_between_steps(lambda: taken.append(True)))
    thread.start()
    thread.join(10)
    assert taken == [True]


def test_interrupts_never_leave_the_lock_held():
    """Signals come at random moments of thousands of turns; another thread gets its turn afterwards."""
    turns = Turns()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    def interrupted(seconds):
        try:  # a busy machine is interrupted before it has returned from the next line
            signal.setitimer(signal.ITIMER_REAL, seconds)
            while True:
                with turns.take():
                    pass
                turns.do_between_steps(lambda: None)
        except KeyboardInterrupt:
            return True

    try:
        interrupts = sum(interrupted(2e-5 + (i % 50) * 1e-5) for i in range(300))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 300
    taken = []

    def take():
        with turns.take() as mine:
            taken.append(mine)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(10)
    assert taken == [True]


def test_an_interrupt_at_any_line_of_the_scheduling_loses_no_sequence(model):
    """The interrupted thread also steps for another thread's sequence, which ends or is told that it failed."""
    engine, files = model.engine(), ("scheduler.py", "admission.py")
    whole = model.generate([5, 6, 7], max_new_tokens=2, seed=1)[0].token_ids
    for at in range(1, 10_000):
        other = engine.run(sequences_of(model, [5, 6, 7], max_new_tokens=2, seed=1))
        mine = engine.run(sequences_of(model, [8, 9], max_new_tokens=2))
        lines, interrupted = 0, False

        def trace(frame, event, _):
            nonlocal lines
            if not frame.f_code.co_filename.endswith(files):
                return None
            if event == "line":
                lines += 1
                if lines == at:  # noqa: B023 (called in this turn of the loop alone)
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            list(mine)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        mine.close()
        for _ in range(20):
            if engine.scheduler:
                engine.step()
        (sequence,) = other.sequences
        assert sequence.ended, f"lost by an interrupt at line {at}"
        assert sequence.error is not None or sequence.tokens == whole
        assert not engine.scheduler
        if not interrupted:
            break
    assert at > 100


def test_an_interrupt_in_what_another_thread_asked_for_loses_none_of_it(model, monkeypatch):
    """What was asked in mid-step is done by the thread that stepped, where Ctrl-C may reach it."""
    engine = model.engine()
    enqueue, calls = engine.scheduler.enqueue, []

    def interrupted(sequences, *, again=False):
        calls.append(again)
        enqueue(sequences, again=again)
        if len(calls) == 1:
            raise KeyboardInterrupt

    runs, sequences = [], sequences_of(model, [5, 6], max_new_tokens=3)
    monkeypatch.setattr(engine.scheduler, "enqueue", interrupted)

    def step():
        with engine.turns.take():
            asked = threading.Thread(target=lambda: runs.append(Run(engine, sequences, False)))
            asked.start()
            asked.join()

    with pytest.raises(KeyboardInterrupt):
        step()
    within_seconds(lambda: list(runs[0]))
    assert len(sequences[0].tokens) == 3
    assert calls == [False, True]


def test_an_interrupt_as_a_wait_begins_leaves_the_lock_whole(monkeypatch):
    """The interrupt comes between two lines of `Condition.wait`: the lock is released, its return not yet ensured."""
    turns, entered, leave = Turns(), threading.Event(), threading.Event()

    def hold():
        with turns.take():
            entered.set()
            leave.wait(20)

    def interrupted():
        turns._lock.release()
        raise KeyboardInterrupt

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    with monkeypatch.context() as patch:
        patch.setattr(turns._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.take():
            pass
    leave.set()
    holder.join()

    def take():
        with turns.take() as taken:
            return taken

    assert within_seconds(take)
