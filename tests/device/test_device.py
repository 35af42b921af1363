"""The engine on a device that runs behind the host: nothing unordered, no waiting, the same tokens."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager

import pytest
import torch
from against_reference import assert_equals_reference, random_params, random_prompts
from doubles import Accesses, Lagging, Recorder, engines_on, tensors_in
from tiny_models import FAMILIES
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.step import Steps
from genarm_fast.engine.step_tensors import State
from genarm_fast.kernels import guided_sample
from genarm_fast.speculation.config import Speculation

PLAIN = SamplingParams(max_new_tokens=6, seed=1, stop_token_ids=tuple(range(2, 300, 17)))


@pytest.fixture
def model(tiny_model, tokenizer):
    """A model of two backbones with two slots; tests give it more prompts than that."""
    return GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=2)


def prompts(count=4):
    return random_prompts(random.Random(3), count)


def tokens_of(outputs):
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.mark.parametrize("case", range(24))
def test_the_host_may_be_behind(tiny_model, tokenizer, case):
    """Tokens, log-probabilities, rewards and reasons equal those of rounds that the host waits for."""
    rng = random.Random(case)
    arms = [tiny_model(seed=i + 1) for i in range(case % 3)]
    model = GenARM.from_pretrained(tiny_model(), arms, tokenizer=tokenizer, max_batch_size=rng.randint(1, 4))
    shown = {"rewards": rng.random() < 0.5, "logprobs": rng.choice([None, 0, 3]), "n": rng.randint(1, 2)}
    params = [random_params(rng, len(arms)) for _ in range(rng.randint(1, 6))]
    if case % 2:  # without parameters that need the host
        for each in params:
            each |= {"min_new_tokens": 0, "logit_bias": None}
            each |= {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    requests = [SamplingParams(**each, seed=rng.getrandbits(64), **shown) for each in params]
    texts = random_prompts(rng, len(params))
    drafter = rng.choice([None, "ngram", *model.arm_names])
    speculation = "off" if drafter is None else Speculation(drafter, rng.randint(1, 4))
    with engines_on(Lagging()):
        outputs = model.generate(texts, requests, speculation=speculation)
    for output, each, expected in zip(outputs, params, model.generate(texts, requests, speculation="off")):
        assert_equals_reference(model, output, **each)
        for mine, other in zip(output.completions, expected.completions):
            assert (mine.text, mine.finish_reason, mine.stop_reason) == (
                other.text,
                other.finish_reason,
                other.stop_reason,
            )


def test_a_stop_string_ends_a_row_that_the_device_still_runs(model):
    free = model.generate([5, 6], seed=1, speculation="off", ignore_eos=True, max_new_tokens=12)[0]
    stop = free.text[3:5]
    expected = model.generate([5, 6], seed=1, speculation="off", ignore_eos=True, max_new_tokens=12, stop=[stop])[0]
    with engines_on(Lagging()):
        output = model.generate([5, 6], seed=1, speculation="off", ignore_eos=True, max_new_tokens=12, stop=[stop])[0]
    assert (output.text, output.token_ids, output.finish_reason) == (expected.text, expected.token_ids, "stop")


def test_a_failing_row_leaves_alone(tiny_model, tokenizer):
    """The row's NaN is noticed a round late. The other rows, and the row that gets its slot, are unaffected."""
    broken = tiny_model(seed=7)
    model = GenARM.from_pretrained(broken, tokenizer=tokenizer, max_batch_size=2)
    params = SamplingParams(max_new_tokens=8, seed=3, ignore_eos=True)
    others = [[5, 6, 7], [8, 9], [4, 4, 4, 4]]
    expected = tokens_of(model.generate(others, params))
    weights = broken.get_input_embeddings().weight
    free = {token for line in (*others, *(line[0] for line in expected)) for token in line}
    bad = next(token for token in range(2, 300) if token not in free)
    kept = weights.data[bad].clone()
    try:
        weights.data[bad] = torch.nan
        with engines_on(Lagging()), pytest.raises(Exception, match="NaN") as failure:
            model.generate([others[0], [bad, 5], *others[1:]], params, speculation="off")
    finally:
        weights.data[bad] = kept
    assert tokens_of(output for output in failure.value.outputs if output is not None) == expected


def record(model, without=None, params=PLAIN, speculation="off", count=4):
    recorder = Recorder(without)
    with engines_on(recorder), Accesses(recorder):
        tokens = tokens_of(model.generate(prompts(count), params, speculation=speculation))
    return recorder, tokens


@pytest.mark.parametrize(
    ("params", "speculation"),
    [
        (PLAIN, "off"),
        (PLAIN.override(logprobs=2, rewards=True, n=2), "off"),
        (PLAIN.override(repetition_penalty=1.2), "off"),
        (PLAIN, Speculation("arm", 3)),
        (PLAIN, Speculation("ngram", 2)),
        (PLAIN.override(max_new_tokens=12), "auto"),
    ],
)
def test_conflicting_accesses_are_ordered(model, params, speculation):
    """The cases cover prefill, plain rounds, drafts and their verification, and slots that are refilled."""
    recorder, tokens = record(model, None, params, speculation)
    assert recorder.found == []
    assert recorder.streams == 3
    assert tokens == tokens_of(model.generate(prompts(), params, speculation="off"))


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 2)])
def test_every_hand_over_is_needed(model, speculation):
    """Without any one hand-over, the recorder finds an access that nothing orders."""
    params = PLAIN.override(max_new_tokens=3)
    recorder, _ = record(model, None, params, speculation, count=2)
    assert recorder.hand_overs >= 10
    for number in range(recorder.hand_overs):
        assert record(model, number, params, speculation, count=2)[0].found, number


def test_forwards_of_a_round_may_overlap(model):
    """A round may also be launched before the host has read the previous one."""
    recorder, _ = record(model, count=2)
    forwards = [launch for launch in recorder.launches if launch[0].endswith(".forward")]
    names = {"allocate", "prefill", "decode", "base.forward", "arm[0].forward"}
    assert {name for name, *_ in recorder.launches} == names
    for (_, first, _, end), (_, second, behind, _) in zip(forwards[::2], forwards[1::2]):
        assert first != second
        assert behind.get(first, 0) < end


WAITING_METHODS = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
WAITING_OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave")


class NoWaiting(TorchFunctionMode):
    """A mode that fails where Python asks a tensor for its numbers, or makes a tensor from the host's numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in WAITING_METHODS, f"{name} makes the host wait"
        assert func is not torch.tensor, "torch.tensor copies from the host"
        return func(*args, **(kwargs or {}))


class Trace(TorchDispatchMode):
    """A mode that records operations and the shapes of their results; it fails where the host has to wait."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITING_OPERATIONS, f"{name} makes the host wait"
        assert (kwargs or {}).get("device") in (None, torch.device("cpu")), f"{name} copies between devices"
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        assert all(i is None or i.dtype == torch.int64 for i in indices), f"{name} counts what a mask selects"
        out = func(*args, **(kwargs or {}))
        self.operations.append((name, [tuple(tensor.shape) for tensor in tensors_in(out)]))
        return out


@contextmanager
def traced_rounds():
    """Yield the rows and operations of whole steps in which no row came or went. The kernel `guided_sample` is not
    traced."""
    traces = []
    launch, batches = Steps._launch_as_graph, []

    def traced(self, batch, *rest):
        steady = bool(batches) and batches[-1] is batch
        batches.append(batch)
        if not steady:
            return launch(self, batch, *rest)
        with NoWaiting(), Trace() as trace:
            result = launch(self, batch, *rest)
        traces.append((len(batch), trace.operations))
        return result

    def kernel(*args, **options):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return guided_sample(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "_launch_as_graph", traced)
        patch.setattr("genarm_fast.engine.sampler.guided_sample", kernel)
        patch.setattr("genarm_fast.speculation.model_drafter.guided_sample", kernel)
        # check_cache reads numbers, but only on the CPU.
        for module in ("ragged_attention.arguments", "rotary_append.reference"):
            patch.setattr(sys.modules[f"genarm_fast.kernels.{module}"], "check_cache", lambda *_: None)
        yield traces


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_never_waits_and_its_shapes_repeat(tiny_model, tokenizer, family, speculation):
    model = GenARM.from_pretrained(
        tiny_model(family), tiny_model(family, seed=1), tokenizer=tokenizer, max_batch_size=3
    )
    with engines_on(Lagging()), traced_rounds() as traces:
        model.generate(prompts(5), PLAIN, speculation=speculation, max_new_tokens=16, rewards=True, logprobs=1)
    shapes = {}
    for rows, operations in traces:
        assert operations == shapes.setdefault(rows, operations)
    assert len(traces) >= 8
    assert len(operations) > 50


def test_waiting_is_noticed(model, monkeypatch):
    """This is the control: an operation in a round that reads a tensor."""
    accept = State.accept
    for look in (lambda t: t.item(), lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: bool(t.any())):
        monkeypatch.setattr(State, "accept", lambda *args, look=look: (look(args[1][0]), accept(*args))[1])
        with engines_on(Lagging()), traced_rounds(), pytest.raises(AssertionError, match=r"wait|mask"):
            model.generate(prompts(2), PLAIN, speculation="off", ignore_eos=True)
