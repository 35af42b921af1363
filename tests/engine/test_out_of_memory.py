"""After a step that runs out of memory, fewer sequences run together. This is logged, and no sequence is lost."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cuda_driver import OnCpuTensors, cuda_driver
from doubles import Lagging, engines_on
from tiny_models import similar

from genarm_fast import GenARM, SamplingParams
from genarm_fast.device.base import out_of_memory
from genarm_fast.device.cuda import Cuda, Graph
from genarm_fast.engine import scheduler
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.config import Speculation

PROMPTS = [[5, 6, 7], [8, 9], [4, 4, 4, 4], [11, 12], [13]]
PARAMS = [
    SamplingParams(max_new_tokens=12 + i, seed=i, stop_token_ids=list(range(2, 300, 31)), rewards=i == 2)
    for i in range(5)
]


@contextmanager
def on_cuda():
    with cuda_driver(), engines_on(OnCpuTensors()):
        yield


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
DEVICES = {"cpu": nullcontext, "lagging": lambda: engines_on(Lagging()), "cuda": on_cuda}


@pytest.fixture
def model(tiny_model, tokenizer):
    return GenARM.from_pretrained(tiny_model(), similar(), tokenizer=tokenizer, max_batch_size=4)


@pytest.fixture
def scarce(monkeypatch):
    """scarce(most): forwards of more than `most` rows find no memory; it returns the row counts of the other
    forwards."""
    forward, ran = ModelRunner._run, []

    def limit(most, error=OUT_OF_MEMORY):
        def scarcely(self, model, lanes, tokens, *rest):
            if tokens.shape[1] > most:
                raise error
            ran.append(tokens.shape[1])
            return forward(self, model, lanes, tokens, *rest)

        monkeypatch.setattr(ModelRunner, "_run", scarcely)
        return ran

    return limit


def results(outputs):
    return [(c.token_ids, c.finish_reason, c.text, c.weights) for output in outputs for c in output.completions]


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 2), Speculation("ngram", 3)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_fewer_run_together_and_none_is_lost(model, scarce, caplog, device, most, speculation):
    expected = model.generate(PROMPTS, PARAMS)
    model.release()
    with DEVICES[device](), caplog.at_level(logging.WARNING):
        ran = scarce(most)
        outputs = model.generate(PROMPTS, PARAMS, speculation=speculation)
        engine = model.engine()
    assert results(outputs) == results(expected)
    assert outputs[2].completions[0].rewards.keys() == {"arm"}
    assert set(ran) <= set(range(1, most + 1))
    assert engine.workspace.slots == max(2**i for i in range(3) if 2**i <= most)
    said = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert said[0].startswith("a step of 4 sequences ran out of memory: at most 2 run together from now on (CUDA out")
    assert len(said) == (2 if most == 1 else 1)


def test_nothing_of_the_step_is_held(model, scarce):
    """The step's logits and caches are free before the next step begins."""
    scarce(2)
    with on_cuda():
        engine = model.engine()
        for request in model.prepare(PROMPTS[:2], PARAMS[:2]):
            engine.add(request)
        for _ in range(3):
            engine.step()
        assert engine.steps.in_flight is not None
        for request in model.prepare(PROMPTS[2:4], PARAMS[2:4]):
            engine.add(request)
        while engine.admission.reduced_batch_size is None:
            engine.step()
        assert engine.steps.before is engine.steps.in_flight is None
        assert engine.workspace.bytes == 0
        assert [each.slot for each in engine.scheduler.waiting] == [-1] * 4
        while engine.scheduler:
            engine.step()


def test_graphs_without_memory(model, monkeypatch, caplog):
    """The capture fails, so the step runs again with fewer sequences, whose graph is smaller."""
    expected = model.generate(PROMPTS, PARAMS)
    make, tried = Graph.__init__, []

    def fails(self, stream, pool, function, inputs):
        tried.append(inputs[0].shape[1])
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        make(self, stream, pool, function, inputs)

    monkeypatch.setattr(Graph, "__init__", fails)
    with on_cuda():
        assert results(model.generate(PROMPTS, PARAMS)) == results(expected)
    assert tried[0] == 4
    assert 2 in tried[1:]
    assert "at most 2 run together" in caplog.text


def test_long_chunks_of_a_prompt_without_memory(model, monkeypatch, caplog):
    """One prompt alone gets shorter chunks from then on."""
    prompt, widths, prefill = [(7 * i) % 290 + 2 for i in range(101)], [], ModelRunner.prefill
    expected = model.generate(prompt, PARAMS[0])
    model.release()
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 8)

    def scarcely(self, tokens, *rest):
        widths.append(tokens.shape[-1])
        if widths[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        prefill(self, tokens, *rest)

    monkeypatch.setattr(ModelRunner, "prefill", scarcely)
    with on_cuda():
        assert results(model.generate(prompt, PARAMS[0])) == results(expected)
        assert widths[:3] == [64, 8, 8]


def test_without_memory_for_one_it_fails(model, scarce, caplog):
    """The engine tries twice, the second time with smaller caches and chunks. It works for later requests."""
    expected = model.generate(PROMPTS[0], PARAMS[0])
    scarce(0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        model.generate(PROMPTS[0], PARAMS[0])
    assert caplog.text.count("at most 1 run together") == 1
    scarce(4)
    assert results(model.generate(PROMPTS[0], PARAMS[0])) == results(expected)


def test_other_errors_fail_as_ever(model, scarce):
    scarce(2, RuntimeError("device lost"))
    with pytest.raises(RuntimeError, match="device lost"):
        model.generate(PROMPTS, PARAMS)


def test_memory_that_is_there_again_is_used(model, scarce):
    """The limit rises again when no sequence runs any more and others come."""
    scarce(2)
    model.generate(PROMPTS, PARAMS)
    assert model.engine().admission.reduced_batch_size == 2
    ran = scarce(4)
    del ran[:]
    model.generate(PROMPTS, PARAMS)
    assert max(ran) == 4


@pytest.mark.parametrize("ends", [False, True])
def test_tokens_of_a_step_that_is_cut_short_count(model, monkeypatch, ends):
    """The step has produced tokens, and perhaps ended a text, before its last forward finds no memory."""
    params = SamplingParams(max_new_tokens=3 if ends else 12, ignore_eos=True, seed=3)
    expected, finish, left = model.generate(PROMPTS[:2], params), Steps.finish, [2]

    def cut_short(self, step):
        finish(self, step)
        left[0] -= 1
        if not left[0]:
            raise MemoryError

    monkeypatch.setattr(Steps, "finish", cut_short)
    outputs = model.generate(PROMPTS[:2], params, speculation=Speculation("arm", 2))
    assert left[0] <= 0
    assert results(outputs) == results(expected)


def test_streams_hear_of_every_token(model, scarce):
    scarce(2)
    expected = {}
    for i, prompt in enumerate(PROMPTS[:3]):
        expected[i] = model.generate(prompt, PARAMS[i])[0].token_ids
    with on_cuda(), model.stream(PROMPTS[:3], PARAMS[:3]) as stream:
        heard = {i: [] for i in range(3)}
        for chunk in stream:
            heard[chunk.index] += chunk.token_ids
    assert heard == expected


def test_what_cublas_says():
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def test_prompts_come_in_chunks_of_4096_on_a_gpu():
    """Chunks have at least 4096 tokens where nobody waits for a token. Beside running sequences they have at most 512,
    so that these wait for few steps."""
    assert Cuda.prefill_factor * scheduler.CHUNK_TOKENS >= 4096
    assert scheduler.CHUNK_TOKENS <= 512
