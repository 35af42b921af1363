"""Whole steps on CUDA tensors without a GPU: no tensor stays on the CPU, and the host reads nothing in a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, FakeCuda
from tiny_models import build_model, save_adapter

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.kernels import _native
from genarm_fast.kernels.arm_logps import streamed
from genarm_fast.kernels.arm_logps.triton import TILES
from genarm_fast.kernels.ragged_attention import plan
from genarm_fast.kernels.ragged_attention import triton as attention
from genarm_fast.models import fast_modules, few_rows, stacked_decoder
from genarm_fast.speculation.config import OFF, Speculation


@pytest.fixture(autouse=True)
def without_core(monkeypatch):
    """Switch the C++ core off: it replaces modules by its own, which run on the CPU."""
    monkeypatch.setattr(_native, "core", None)


@pytest.fixture
def two_models(tokenizer):
    return lambda family="llama": GenARM.from_pretrained(
        build_model(family, 0), [build_model(family, 1)], tokenizer=tokenizer
    )


@pytest.fixture
def lanes(tmp_path, tokenizer):
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(tmp_path / f"arm{seed}", base=tmp_path / "base", seed=seed)
    arms = [tmp_path / "arm1", tmp_path / "arm2"]
    return lambda: GenARM.from_pretrained(tmp_path / "base", arms, dtype=torch.float32, device="cpu")


def decode(model, speculation=OFF, prompts=((5, 6, 7), (8, 9)), **params):
    """Decode on the fake device; return the names of the kernels launched."""
    params = SamplingParams(**{"max_new_tokens": 5, "ignore_eos": True, "seed": 1, **params})
    requests = model.prepare([list(prompt) for prompt in prompts], params)
    fake = FakeCuda()
    with fake.model(model), fake:
        engine = model.engine()
        for request in requests:
            engine.add(request, speculation)
        while engine.scheduler:
            engine.step()
    return fake.launched


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_two_models(two_models, family):
    launched = decode(two_models(family))
    assert {"scores_kernel", "draw_kernel", "settle_kernel", "attend_kernel", "append_kernel"} <= set(launched)


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 3, "rewards": True, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"logit_bias": {7: -2.0}, "min_new_tokens": 3, "stop_token_ids": [9], "weights": 0.0},
    ],
)
def test_parameters(two_models, params):
    decode(two_models(), **params)


@pytest.mark.parametrize("drafter", ["arm", "base", "ngram"])
def test_drafts(two_models, drafter):
    decode(two_models(), Speculation(drafter, 2))


def test_lanes(lanes):
    decode(lanes())


STACKED = {"norm_kernel", "rotary_append_kernel", "attend_kernel", "gated_kernel"}


@pytest.mark.parametrize("speculation", [OFF, Speculation("arm", 2)])
def test_stacked_decoders(two_models, monkeypatch, speculation):
    """Both models use it, in prompts and steps, with and without drafts."""
    monkeypatch.setattr(fast_modules, "on_gpu", lambda model: True)
    model = two_models("qwen3")
    launched = decode(model, speculation)
    assert {"scores_kernel", "draw_kernel", "settle_kernel", *STACKED} <= set(launched)
    assert "append_kernel" not in launched  # "append_kernel" belongs to the models' own forwards


@pytest.mark.parametrize("stacked", [False, True])
def test_splits_are_combined_where_they_are_made(two_models, monkeypatch, stacked):
    """Rows of several splits take no extra launch, in both forwards: each runner has its own counters."""
    monkeypatch.setattr(plan, "CHUNK", 16)
    monkeypatch.setattr(fast_modules, "on_gpu", lambda model: stacked)
    model, counters = two_models("qwen3"), set()
    attend = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *given: counters.add(id(given[-1])) or attend(*given))
    launched = decode(model)
    assert "attend_kernel" in launched
    assert "combine_kernel" not in launched
    assert len(counters) == 2
    monkeypatch.setattr(attention, "ordered", lambda _: False)
    assert "combine_kernel" in decode(two_models("qwen3"))


def test_stacked_lanes(lanes, monkeypatch):
    monkeypatch.setattr(fast_modules, "on_gpu", lambda model: True)
    launched = decode(lanes())
    assert {"scores_kernel", "draw_kernel", "settle_kernel", *STACKED} <= set(launched)


def test_products_of_few_rows_in_steps(two_models, monkeypatch):
    """The decoders take the few-rows kernel as if it had been measured to be faster, which needs a GPU."""

    def serves(product, x):
        return x.is_cuda and x.shape[:-1].numel() <= max(few_rows.MEASURED_ROWS)

    monkeypatch.setattr(fast_modules, "on_gpu", lambda model: True)
    monkeypatch.setattr(stacked_decoder, "serves", serves)
    assert "few_rows_kernel" in decode(two_models("qwen2"), Speculation("arm", 2))


def test_log_probs_of_training():
    """Run forward and backward of a trained output layer with a bias: no CPU tensor and no host read.

    Both are called directly, because autograd's own threads ask for the driver.
    """
    saved = []
    context = SimpleNamespace(needs_input_grad=[True] * 3, save_for_backward=lambda *given: saved.extend(given))
    with FakeCuda() as fake:
        rows, weight, bias = (
            torch.empty(shape, dtype=torch.bfloat16, device=CUDA) for shape in ((3, 8), (100, 8), (100,))
        )
        targets = torch.empty(3, dtype=torch.int64, device=CUDA)
        logps = streamed._ArmLogps.forward(context, rows, weight, bias, targets, 1.0, 5.0, TILES)
        direction, *rest = saved
        gradients = [direction, *streamed._layer_gradients(context, logps, *rest)]
    assert [(each.shape, each.dtype) for each in gradients] == [
        (shape, torch.bfloat16) for shape in ((3, 8), (100, 8), (100,))
    ]
    assert fake.launched == ["absorb_kernel", "slopes_kernel"]


def test_labels_of_log_probs_are_not_read():
    with FakeCuda() as fake, torch.no_grad():
        hidden, weight = torch.empty((2, 3, 8), device=CUDA), torch.empty((100, 8), device=CUDA)
        labels = torch.empty((2, 3), dtype=torch.int64, device=CUDA)
        logps = streamed.token_logps(hidden, weight, labels, None, 1.0, None, TILES)
        assert (logps.shape, logps.device) == (labels.shape, CUDA)
    assert fake.launched == ["absorb_kernel"]


def test_a_tensor_that_stays_on_the_cpu_is_noticed(two_models, monkeypatch):
    monkeypatch.setattr(Executor, "upload", lambda self, tensor: tensor)
    with pytest.raises(Exception, match=r"cpu"):
        decode(two_models())


def test_a_host_read_is_noticed(two_models, monkeypatch):
    bound = Batch.kv_bound

    def reads(self, members, width):
        return max(bound(self, members, width), int(self.state.lengths.max()))

    monkeypatch.setattr(Batch, "kv_bound", reads)
    with pytest.raises(Exception, match="the host reads a tensor on the device"):
        decode(two_models())
