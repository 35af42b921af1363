"""benchmarks/step_overhead.py runs steps with and without drafts, on graphs that do nothing."""


def test_every_kind_of_step_is_measured(script):
    module = script("step_overhead")
    for plan in module.PLANS.values():
        assert 0 < module.measure(2, plan, 30) < 1e6
