"""Whole generations as on a GPU; test_interpreted_generation.py runs them in a process of their own. Triton's kernels
run in its interpreter, under the stacked decoder. Stand-ins replace streams and replay captured graphs."""

import inspect
import os

import pytest
import torch
from against_reference import assert_equals_reference, reference_completion
from cuda_driver import OnCpuTensors, cuda_driver
from doubles import engines_on
from interpreter import no_reads
from tiny_models import build_model, save_adapter
from triton.runtime.interpreter import InterpretedFunction

from genarm_fast import GenARM, SamplingParams
from genarm_fast.device import cuda
from genarm_fast.engine.step_graph import StepGraph
from genarm_fast.kernels import _dispatch, _native
from genarm_fast.models.stacked_decoder import StackedDecoder
from genarm_fast.speculation.config import Speculation

assert os.environ.get("TRITON_INTERPRET") == "1"
PROMPTS = [[5, 6, 7, 8, 9], [9, 3], [40, 41, 42]]
PARAMS = [
    {"weights": [1.0, -0.5], "max_new_tokens": 9, "ignore_eos": True},
    {"weights": [0.0, 2.0], "max_new_tokens": 7, "stop_token_ids": list(range(2, 300, 7)), "top_p": 0.8, "top_k": 30},
    {"weights": [0.3, 0.3], "max_new_tokens": 5, "temperature": 0.0, "min_new_tokens": 2},
]
# The interpreter spends most of its time on attention heads: SMALL has few, and `test_lanes` has more layers and heads.
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "GPUS", ("cpu",))
    monkeypatch.setattr(_native, "core", None)
    monkeypatch.setenv("GENARM_FAST_SELFCHECK", "never")  # the tests compare every text


@pytest.fixture(autouse=True)
def compiled_before(monkeypatch):
    """A capture launches nothing that Triton has not compiled by then, for arguments like these.

    On a GPU the first launch of a specialisation loads a module, which CUDA refuses in a capture. Graphs have clones of
    what the warm-up was given, so an address that is no multiple of 16 in one of the two would do.
    """
    captured, launch = cuda.captured, InterpretedFunction.__getitem__
    seen, capturing, late = set(), [], []

    def capture(*args):
        capturing.append(True)
        try:
            return captured(*args)
        finally:
            capturing.pop()

    def getitem(kernel, grid):
        run, parameters = launch(kernel, grid), inspect.signature(kernel.fn).parameters

        def launched(*args, **options):
            given = dict(zip(parameters, args)) | options
            key = [kernel.fn.__name__]
            for name, value in given.items():
                constant = name not in parameters or "constexpr" in str(parameters[name].annotation)
                key.append((name, value if constant else specialisation(value)))
            if (text := repr(key)) not in seen and capturing:
                late.append(text)
            seen.add(text)
            return run(*args, **options)

        return launched

    monkeypatch.setattr(cuda, "captured", capture)
    monkeypatch.setattr(InterpretedFunction, "__getitem__", getitem)
    yield
    assert seen
    assert late == []


def specialisation(value):
    """What Triton compiles an argument for."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(map(specialisation, value))
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)


@pytest.fixture(params=[SMALL])
def lanes(tmp_path, tokenizer, request):
    """A base of the given shape with two LoRA ARMs."""
    build_model("llama", 0, **request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(tmp_path / f"arm{seed}", base=tmp_path / "base", seed=seed)
    arms = [tmp_path / "arm1", tmp_path / "arm2"]
    return GenARM.from_pretrained(tmp_path / "base", arms, dtype=torch.float32, device="cpu", max_batch_size=2)


@pytest.fixture
def two_models(tokenizer):
    base, arm = build_model("qwen2", 0, **SMALL | {"num_hidden_layers": 2}), build_model("qwen3", 1, **SMALL)
    return GenARM.from_pretrained(base, arm, tokenizer=tokenizer, max_batch_size=2)


def decode(model, speculation):
    """Decode three requests in two slots and compare them with the reference; return the log and the device."""
    arms = len(model.arms)
    params = [each | {"weights": each["weights"][:arms]} for each in PARAMS]
    sampling = [SamplingParams(**each, seed=i) for i, each in enumerate(params)]
    with cuda_driver() as log, engines_on(OnCpuTensors()) as device:
        outputs = model.generate(PROMPTS, sampling, speculation=speculation)
        runners = model.engine().executor.runners
        assert all(isinstance(vars(each.model.base_model)["forward"], StackedDecoder) for each in runners)
    for output, each in zip(outputs, params):
        assert_equals_reference(model, output, **each)
    return log, device


@pytest.fixture
def launches(monkeypatch):
    """The number of drafts of each step that was one launch. Such a step must not read on the host."""
    launch, drafts = StepGraph.launch, []

    def launched(self, batch, drafter, k, **shadows):
        drafts.append(k)
        with no_reads():
            return launch(self, batch, drafter, k, **shadows)

    monkeypatch.setattr(StepGraph, "launch", launched)
    return drafts


@pytest.mark.parametrize("lanes", [{"num_hidden_layers": 2}], indirect=True)
def test_lanes(lanes, launches):
    log, device = decode(lanes, "off")
    assert len(log.of("replay")) >= 3
    assert {entry[-1] for entry in log.of("replay")} == {device.streams[0]}
    assert set(launches) == {0}


def test_lanes_with_drafts_of_the_text(lanes, launches):
    log, device = decode(lanes, Speculation("ngram", 3))
    assert {entry[-1] for entry in log.of("replay")} >= {device.streams[0]}
    assert launches.count(3) > 6


def test_two_models_with_drafts(two_models, launches):
    log, device = decode(two_models, Speculation("arm", 2))
    assert {entry[-1] for entry in log.of("replay")} >= {device.streams[0]}  # stop tokens are banned for two steps
    assert launches.count(2) > 6


def test_a_draft_model(tokenizer, launches):
    """The draft model is no member of the target. The first step gives it the prompt; the other steps are one
    launch."""
    base, draft = (build_model(family, 0, **SMALL) for family in ("qwen2", "llama"))
    model = GenARM.from_pretrained(base, draft_model=draft, tokenizer=tokenizer, max_batch_size=2)
    log, device = decode(model, Speculation("draft_model", 3))
    assert {entry[-1] for entry in log.of("replay")} >= {device.streams[0]}
    assert launches.count(3) > 3


def test_lanes_with_a_draft_model(tmp_path, tokenizer, launches):
    """A small draft model drafts for a base and a LoRA ARM that share a forward, in the same launch."""
    build_model("llama", 0, **SMALL).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "arm", base=tmp_path / "base", seed=1)
    options = {"draft_model": build_model("qwen2", 0, **SMALL), "dtype": torch.float32, "device": "cpu"}
    model = GenARM.from_pretrained(tmp_path / "base", tmp_path / "arm", max_batch_size=2, **options)
    log, device = decode(model, Speculation("draft_model", 2))
    assert len(model.engine().executor.groups[0]) == 2
    assert {entry[-1] for entry in log.of("replay")} >= {device.streams[0]}
    assert launches.count(2) > 3


def test_weights_that_change(lanes):
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, seed=4, weights=[1.0, 0.0])
    with cuda_driver(), engines_on(OnCpuTensors()), lanes.stream(PROMPTS[0], params) as stream:
        for chunk in stream:
            stream.set_weights([1.0 - len(chunk.token_ids), chunk.token_ids[-1] / 100])
    completion = stream.output.completions[0]
    used = completion.weights
    assert len(set(used)) > 3
    expected = reference_completion(
        lanes, stream.output, completion, weights=used.__getitem__, max_new_tokens=8, ignore_eos=True
    )
    assert completion.token_ids == expected.tokens
