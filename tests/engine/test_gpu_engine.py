"""The engine on a real CUDA device, where test_cuda.py and test_device.py use stubs and doubles. docs/gpu.md says what
has run."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from against_reference import assert_equals_reference, random_params, random_prompts
from doubles import engines_on
from tiny_models import FAMILIES, MIXTURES, build_model, save_adapter

from genarm_fast import GenARM, SamplingParams
from genarm_fast.device.base import Device
from genarm_fast.device.cuda import WARM_UP, Cuda
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.config import Speculation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def exact():
    """Compute float32 products without TF32, whose 10 bits of mantissa flip draws."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def pair(tokenizer):
    """make(family, arms, rows) returns the same members on the CPU and on CUDA."""

    def make(family="llama", arms=1, rows=3):
        models = [[build_model(family, seed).to(device) for seed in range(arms + 1)] for device in ("cpu", "cuda")]
        return [GenARM.from_pretrained(base, own, tokenizer=tokenizer, max_batch_size=rows) for base, *own in models]

    return make


def tokens_of(outputs):
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.mark.parametrize("case", range(24))
def test_tokens_are_the_cpu_s(pair, case):
    rng = random.Random(case)
    cpu, cuda = pair(arms=case % 3, rows=rng.randint(1, 4))
    params = [random_params(rng, case % 3) for _ in range(rng.randint(1, 6))]
    prompts = random_prompts(rng, len(params))
    shown = {"rewards": rng.random() < 0.5, "logprobs": rng.choice([None, 0, 3]), "n": rng.randint(1, 2)}
    requests = [SamplingParams(**each, seed=rng.getrandbits(64), **shown) for each in params]
    expected = cpu.generate(prompts, requests, speculation="off")
    for drafter in (None, "ngram", *cuda.arm_names):
        speculation = "off" if drafter is None else Speculation(drafter, rng.randint(1, 6))
        assert tokens_of(cuda.generate(prompts, requests, speculation=speculation)) == tokens_of(expected)
    for output, each in zip(expected, params):
        assert_equals_reference(cpu, output, **each)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_families(pair, family):
    """Mixtures of experts may count their rows, so they fall back from graphs with a warning."""
    cpu, cuda = pair(family)
    prompts = random_prompts(random.Random(family), 5, 25)
    params = SamplingParams(max_new_tokens=20, seed=1, stop_token_ids=tuple(range(2, 300, 19)))
    tokens = tokens_of(cuda.generate(prompts, params, speculation="off"))
    assert tokens == tokens_of(cpu.generate(prompts, params, speculation="off"))


def test_lanes(tmp_path, tokenizer):
    """A LoRA ARM shares the forward of its base."""
    base = build_model("llama", 0)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "arm", base=tmp_path / "base", seed=1)
    prompts, params = random_prompts(random.Random(1), 4), SamplingParams(max_new_tokens=30, seed=1, ignore_eos=True)
    tokens = [
        tokens_of(
            GenARM.from_pretrained(tmp_path / "base", tmp_path / "arm", device=device).generate(
                prompts, params, speculation="off"
            )
        )
        for device in ("cpu", "cuda")
    ]
    assert tokens[0] == tokens[1]


def test_replayed_graphs_draw_fresh_noise(pair):
    """Equal prompts with different seeds, and one seed over positions, go through one graph."""
    _, cuda = pair()
    with engines_on(Cuda()) as device:
        output = cuda.generate([5, 6, 7], n=3, seed=1, temperature=3.0, max_new_tokens=60, ignore_eos=True)[0]
    assert device.graphs
    tokens = [completion.token_ids for completion in output.completions]
    assert len({tuple(line) for line in tokens}) == 3
    assert all(len(set(line)) > 20 for line in tokens)


def test_streams_and_graphs_change_nothing(pair):
    """All work in order on one stream, without graphs, gives the same tokens."""
    _, cuda = pair(arms=2)
    prompts = random_prompts(random.Random(2), 7, 40)
    params = [SamplingParams(max_new_tokens=5 + 7 * i, seed=i, rewards=True) for i in range(7)]
    for speculation in ("off", Speculation("arm", 3)):
        tokens = tokens_of(cuda.generate(prompts, params, speculation=speculation))
        with engines_on(Device()):
            assert tokens_of(cuda.generate(prompts, params, speculation=speculation)) == tokens


def test_a_round_never_waits(pair, monkeypatch):
    """Once the shapes are warm, PyTorch finds nothing in the launch of a round that blocks the host."""
    _, cuda = pair(arms=2)
    steps, batches = [], []
    launch = Steps.launch

    def strict(self, batch, *rest):
        steady = bool(batches) and batches[-1] is batch and bool(self.executor.device.graphs)
        batches.append(batch)
        if not steady:
            return launch(self, batch, *rest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.append(launch(self, batch, *rest))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return steps[-1]

    monkeypatch.setattr(Steps, "launch", strict)
    params = {"max_new_tokens": 40, "ignore_eos": True, "rewards": True, "top_p": 0.9, "seed": 1}
    cuda.generate(random_prompts(random.Random(1), 3), speculation="off", **params)
    assert len(steps) > 30


@pytest.mark.parametrize("drafter", ["arm", "ngram"])
def test_a_step_with_drafts_never_waits(pair, monkeypatch, drafter):
    """Drafts, their verification and the draw are one launch, before the previous step is read."""
    _, cuda = pair()
    launch, strict_steps = Steps.launch, []

    def strict(self, batch, *rest):
        if not self.executor.device.graphs or rest[1].k == 0:
            return launch(self, batch, *rest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            strict_steps.append(launch(self, batch, *rest))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return strict_steps[-1]

    monkeypatch.setattr(Steps, "launch", strict)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, seed=1)
    (output,) = cuda.generate([5, 6, 7], params, speculation=Speculation(drafter, 2))
    assert len(output.token_ids) == 60
    assert len(strict_steps) > 5


def test_graphs_that_go_leave_the_others_right(pair):
    """cuBLAS's memory belongs to the streams, so no part goes with a graph. The test overwrites freed memory at
    once."""
    cpu, cuda = pair(rows=4)
    prompts = random_prompts(random.Random(3), 4)
    params = [SamplingParams(max_new_tokens=10 + 25 * i, seed=i, ignore_eos=True) for i in range(4)]
    expected = tokens_of(cpu.generate(prompts, params, speculation="off"))
    with engines_on(Cuda()) as device:
        device.most_graphs = 2
        for _ in range(4):
            assert tokens_of(cuda.generate(prompts, params, speculation="off")) == expected
            torch.cuda.empty_cache()
            assert [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
        assert len(device.graphs) == 2


def test_threads_take_turns_at_captures(pair, recwarn):
    """Whichever thread comes when a shape has to be captured, no shape falls back from graphs."""
    cpu, cuda = pair(rows=8)
    prompts = random_prompts(random.Random(5), 8)
    params = SamplingParams(max_new_tokens=60, seed=1, ignore_eos=True)
    expected = [tokens_of(cpu.generate(prompt, params, speculation="off")) for prompt in prompts]
    with engines_on(Cuda()) as device, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda prompt: cuda.generate(prompt, params, speculation="off"), prompts))
        assert device.graphs
        assert not device.eager
    assert [tokens_of(outputs) for outputs in found] == expected
    assert not [each for each in recwarn if "CUDA graph" in str(each.message)]


def test_a_capture_that_failed_is_over():
    """After a failed capture, PyTorch's allocator frees memory that another stream has used, and later captures
    work."""
    device = Cuda()
    stream, other = device.stream(torch.device("cuda", 0)), torch.cuda.Stream()

    def call(key, function):
        given = torch.ones(3, device="cuda")
        device.begin()
        (out,) = device.launch(stream, "call", device.repeat, stream, key, function, given)
        device.finish()
        return out.tolist()

    with pytest.warns(UserWarning, match="without a CUDA graph"):
        found = [call("reads", lambda x: (x + float(x.sum()),)) for _ in range(WARM_UP + 2)]
    assert found == [[4, 4, 4]] * len(found)
    device.eager.clear()
    found = [call("adds", lambda x: (x + 1,)) for _ in range(WARM_UP + 2)]
    assert found == [[2, 2, 2]] * len(found)
    assert len(device.graphs) == 1
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    tensor = torch.empty(1 << 26, device="cuda")
    tensor.record_stream(other)
    del tensor
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [2, 8, 16, 32, 96, 128, 512])
@pytest.mark.parametrize(("outputs", "inputs"), [(6192, 4096), (4112, 14336), (28704, 4096), (49152, 576), (300, 32)])
def test_equal_rows_have_equal_bits(outputs, inputs, rows, dtype):
    """Rows that fill a step up repeat its first one: if they drew other tokens, they would write these to its slot."""
    from genarm_fast.kernels.small_linear.triton import launch

    generator = torch.Generator("cuda").manual_seed(0)
    weight, x = (torch.randn(n, inputs, generator=generator, device="cuda").to(dtype) for n in (outputs, 1))
    for multiply in (torch.nn.functional.linear, launch):
        y = multiply(x.repeat(rows, 1), weight)
        assert y is None or torch.equal(y, y[:1].expand_as(y))


def test_memory_is_given_back(pair):
    """Caches and graphs are freed with their run, also when the run is left early."""
    _, cuda = pair()
    params = {"max_new_tokens": 60, "ignore_eos": True, "seed": 1}
    cuda.generate([5, 6, 7], **params)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        with cuda.stream([5, 6, 7], **params) as stream:
            next(iter(stream))
        cuda.generate([5, 6, 7], **params)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 3)])
def test_members_on_two_devices(pair, tokenizer, speculation):
    cpu, _ = pair()
    base, arm = build_model("llama", 0).to("cuda:0"), build_model("llama", 1).to("cuda:1")
    cuda = GenARM.from_pretrained(base, arm, tokenizer=tokenizer, max_batch_size=3)
    prompts, params = random_prompts(random.Random(4), 6), SamplingParams(max_new_tokens=30, seed=1)
    tokens = tokens_of(cuda.generate(prompts, params, speculation=speculation))
    assert tokens == tokens_of(cpu.generate(prompts, params, speculation="off"))


def test_an_arm_on_the_cpu(pair, tokenizer):
    """Every round waits for the ARM on the CPU: this is slow, but right."""
    cpu, _ = pair()
    cuda = GenARM.from_pretrained(build_model("llama", 0).cuda(), build_model("llama", 1), tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=20, seed=1)
    prompts = random_prompts(random.Random(4), 3)
    assert tokens_of(cuda.generate(prompts, params)) == tokens_of(cpu.generate(prompts, params))


def test_flash_attention(tmp_path, tokenizer):
    """In bfloat16, flash attention gives the same greedy tokens as the reference attention, on a model with widely
    spaced logits."""
    pytest.importorskip("flash_attn")
    build_model("llama", 0, head_dim=32).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = random_prompts(random.Random(4), 5)
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True, logprobs=0)
    outputs = [
        GenARM.from_pretrained(tmp_path, device="cuda", attn_implementation=name).generate(prompts, params)
        for name in ("sdpa", "flash_attention_2")
    ]
    for plain, flash in zip(*outputs):
        first = [output.completions[0].logprobs[0].logprob for output in (plain, flash)]
        assert first[0] == pytest.approx(first[1], abs=0.05)
