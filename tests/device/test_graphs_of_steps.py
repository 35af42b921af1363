"""Steps as one graph on CUDA: which numbers change without another capture, and which requests leave the graph and
return."""

from __future__ import annotations

import itertools

import pytest
from against_reference import reference_completion
from cuda_driver import OnCpuTensors, cuda_driver
from doubles import engines_on
from tiny_models import similar

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.config import Speculation

FREE = SamplingParams(max_new_tokens=24, ignore_eos=True, seed=1)
PLANS = pytest.mark.parametrize(
    "plan", ["off", Speculation("arm", 2), Speculation("ngram", 2)], ids=["off", "arm", "ngram"]
)


@pytest.fixture
def model(tiny_model, tokenizer):
    return GenARM.from_pretrained(tiny_model(), similar(), tokenizer=tokenizer, max_batch_size=2)


def unchanged(input_ids, scores):
    return scores


@PLANS
@pytest.mark.parametrize(
    "needing", [{"repetition_penalty": 1.3}, {"logits_processors": [unchanged]}], ids=["penalty", "processor"]
)
def test_requests_that_need_the_host_leave_the_graph_and_the_others_return(model, monkeypatch, plan, needing):
    """Steps with such a request are launched in pieces, each forward as a graph of its own. All other steps are one
    launch."""
    steps, launch = [], Steps.launch

    def pieces(self, batch, policy, choice, one=False):
        steps.append((one, any(each.request.needs_host for each in batch.sequences)))
        return launch(self, batch, policy, choice, one)

    prompts = [[5, 6, 7], [8, 9], [4, 4, 4], [11, 12]]
    params = [FREE.override(max_new_tokens=n) for n in (60, 5, 12, 6)]
    for i in (1, 3):
        params[i] = params[i].override(**needing)
    expected = [output.token_ids for output in model.generate(prompts, params)]
    monkeypatch.setattr(Steps, "launch", pieces)
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        outputs = model.generate(prompts, params, speculation=plan)
    assert [output.token_ids for output in outputs] == expected
    kinds = [key for key, _ in itertools.groupby(needed for _, needed in steps)]
    assert kinds == [True, False, True, False]  # one host-bound request after the other, beside the first request
    assert all(one != needed for one, needed in steps)
    main = log.of("stream")[0][1]
    assert {entry[-1] is main for entry in log.of("replay")} == {False, True}


NUMBERS = [
    {"temperature": 0.5},
    {"temperature": 0.0},
    {"seed": 2**63 + 5},
    {"weights": -0.7},
]
FILTERS = [{"top_k": 7, "top_p": 0.9, "min_p": 0.02}, {"top_k": 40, "top_p": 0.5, "min_p": 0.2}]


@PLANS
@pytest.mark.parametrize("changes", [NUMBERS, FILTERS], ids=["numbers", "filters"])
def test_numbers_change_without_a_capture(model, plan, changes):
    """Weights, temperature and seeds change freely; filters do where some request uses each of them anyway."""
    prompt, base = [5, 6, 7], FREE.override(**(changes[0] if "top_k" in changes[0] else {}))
    expected = [model.generate(prompt, base.override(**each)) for each in changes]
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        model.generate(prompt, base, speculation=plan)
        captures, replays = len(log.of("capture")), len(log.of("replay"))
        assert captures > 0
        for each, outputs in zip(changes, expected):
            found = model.generate(prompt, base.override(**each), speculation=plan)
            assert [output.token_ids for output in found] == [output.token_ids for output in outputs]
        assert len(log.of("capture")) == captures
        assert len(log.of("replay")) > replays + 10


@PLANS
def test_weights_that_change_in_mid_generation_stay_in_the_graph(model, monkeypatch, plan):
    """Each step is one launch of the first captured graph. The tokens equal the reference's with the same weights."""
    steps, launch = [], Steps.launch
    monkeypatch.setattr(Steps, "launch", lambda self, *given: steps.append(given[3]) or launch(self, *given))
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        with model.stream([5, 6, 7], FREE.override(max_new_tokens=30), speculation=plan) as stream:
            for chunk in stream:
                stream.set_weights(0.5 + (len(chunk.token_ids) + chunk.token_ids[-1]) % 5 / 4)
        captures = log.of("capture")
    completion = stream.output.completions[0]
    assert len(set(completion.weights)) > 3
    assert set(steps) == {True}
    assert len(captures) == 1
    given = {"weights": completion.weights.__getitem__, "max_new_tokens": 30, "ignore_eos": True}
    assert completion.token_ids == reference_completion(model, stream.output, completion, **given).tokens
