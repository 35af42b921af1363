"""benchmarks/step_overhead.py runs steps with and without drafts, on graphs that do nothing."""

import time


def test_every_kind_of_step_is_measured(script):
    module = script("step_overhead")
    for plan in module.PLANS.values():
        assert 0 < module.measure(2, plan, 30) < 1e6


def test_forwards_are_left_out(script, monkeypatch):
    module = script("step_overhead")
    forward = module.ModelRunner.forward

    def slow(*arguments):
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        return forward(*arguments)

    monkeypatch.setattr(module.ModelRunner, "forward", slow)
    assert 0 < module.measure(2, module.OFF, 16, cpu=True) < 4e4
