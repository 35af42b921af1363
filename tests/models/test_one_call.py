"""All layers in one call of the core: the same bits as separate calls, and no work done for a call that it refuses."""

from __future__ import annotations

import signal
from itertools import chain

import pytest
import torch
from peft import LoraConfig
from runners import runner_of
from tiny_models import VOCAB_SIZE, build_model, save_adapter
from transformers import Cache

from genarm_fast import GenARM
from genarm_fast.kernels import _native
from genarm_fast.models.forward_context import Ragged, at_positions, running
from genarm_fast.models.fused_decoder import WINDOWS
from genarm_fast.models.kv_cache import RaggedLayer
from genarm_fast.models.one_call import OneCall

pytestmark = pytest.mark.skipif(_native.core is None, reason="needs the C++ core")
SLOTS, CAPACITY = 3, 24
ISAS = [isa for isa in _native.core.instruction_sets() if isa != "baseline"] if _native.core else []
# Rows of the cache, first position, tokens: prefill, a step, drafts beyond Mistral's window of 8.
BLOCKS = (([2, 0], 0, 6), ([2, 0], 6, 1), ([2], 7, 5), ([0], 7, 9), ([2, 0], 12, 1))


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@pytest.fixture(params=ISAS)
def isa(request):
    _native.core.use(request.param)
    yield request.param
    _native.core.use(_native.core.instruction_sets()[0])


class Calls(list):
    refused = False


@pytest.fixture
def taken(monkeypatch):
    """The core's result of each call. With `refused` set, the core is not asked, and ops run one by one."""
    own, calls = OneCall.__call__, Calls()

    def call(self, *arguments):
        calls.append(None if calls.refused else own(self, *arguments))
        return calls[-1]

    monkeypatch.setattr(OneCall, "__call__", call)
    return calls


def states_of(decoder, lanes):
    """Return the hidden states of several forwards over one cache, then its keys and values."""
    layers = [RaggedLayer(len(lanes) * SLOTS, CAPACITY) for _ in decoder.layers]
    found = []
    with torch.inference_mode():
        for slots, start, width in BLOCKS:
            rows = torch.tensor([lane * SLOTS + slot for lane in range(len(lanes)) for slot in slots])
            positions = torch.arange(start, start + width).expand(len(rows), width)
            tokens = (13 * positions + 5 * rows[:, None]) % VOCAB_SIZE
            with running(lanes, len(slots)), at_positions(Ragged(rows, positions, start + width)):
                out = decoder(input_ids=tokens, position_ids=positions, past_key_values=Cache(layers=list(layers)))
            found.append(out.last_hidden_state)
    return [*found, *chain.from_iterable((layer.keys, layer.values) for layer in layers)]


def assert_same(decoder, lanes, taken):
    one = states_of(decoder, lanes)
    assert len(taken) == len(BLOCKS)
    assert all(out is not None for out in taken)
    taken.refused = True
    each = states_of(decoder, lanes)
    assert all(torch.equal(*pair) for pair in zip(one, each, strict=True))
    assert all(states.isfinite().all() for states in one)


@dtypes
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", [family.lower() for family in WINDOWS])
def test_bits_of_families(isa, taken, family, threads, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = runner_of(family, dtype).base_model
        taken.clear()  # forget the calls of the trial at load
        assert_same(decoder, [0], taken)
    finally:
        torch.set_num_threads(before)


@dtypes
def test_bits_of_a_row_do_not_depend_on_its_batch(isa, taken, dtype):
    """Calls have 80 tokens, 20, or one. In many rows float32 takes other loops."""
    decoder, slots = runner_of("llama", dtype).base_model, 4
    taken.clear()
    positions = torch.arange(20).expand(slots, 20)
    tokens = (13 * positions + 5 * torch.arange(slots)[:, None]) % VOCAB_SIZE

    def run(rows, width):
        cache = Cache(layers=[RaggedLayer(slots, CAPACITY) for _ in decoder.layers])
        chosen = torch.arange(slots)[rows]
        with torch.inference_mode(), running([0], len(chosen)):
            for part in positions[rows].split(width, 1):
                with at_positions(Ragged(chosen, part, CAPACITY)):
                    given = {"input_ids": tokens[rows][:, part[0]], "position_ids": part}
                    out = decoder(**given, past_key_values=cache).last_hidden_state
        return out

    together = run(slice(None), 20)
    for row in range(slots):
        alone = slice(row, row + 1)
        assert torch.equal(run(alone, 20)[0], together[row])
        assert torch.equal(run(alone, 1)[0, -1], together[row, -1])  # token by token
    assert None not in taken


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), *((torch.bfloat16, quantization) for quantization in (None, "int8", "int4"))],
)
def test_bits_of_lanes(tmp_path, tokenizer, taken, isa, dtype, quantization):
    """Adapters of other linears each; the base has none."""
    base = tmp_path / "base"
    build_model("llama", 0).to(dtype).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name, targets in (("one", ["q_proj", "up_proj", "down_proj"]), ("two", ["o_proj", "q_proj", "v_proj"])):
        save_adapter(tmp_path / name, base=base, seed=len(name), config=LoraConfig(r=4, target_modules=targets))
    arms = [tmp_path / "one", tmp_path / "two"]
    model = GenARM.from_pretrained(base, arms, dtype=dtype, quantization=quantization)
    decoder = model.members[0].shared.base_model
    for lanes in ([0, 1, 2], [2, 0], [1]):
        taken.clear()
        taken.refused = False
        assert_same(decoder, lanes, taken)


@pytest.fixture
def alarm():
    """alarm(seconds) interrupts the main thread after that time, also in the middle of C++."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_call_of_many_tokens_ends_between_two_layers(taken, alarm):
    """Without the interrupt, all 200 layers would run."""
    layers, tokens = 200, 256
    decoder = runner_of("llama", num_hidden_layers=layers).base_model
    caches = [RaggedLayer(1, tokens) for _ in range(layers)]
    given = torch.arange(tokens)[None]
    with torch.inference_mode(), running([0], 1), at_positions(Ragged(torch.tensor([0]), given, tokens)):
        taken.clear()
        alarm(0.03)
        with pytest.raises(KeyboardInterrupt):
            decoder(input_ids=given, position_ids=given, past_key_values=Cache(layers=list(caches)))
    assert caches[0].keys.any()
    assert not caches[-1].keys.any()
    assert not taken  # the call returned nothing


def test_a_long_prompt_can_be_interrupted(tokenizer, alarm):
    """Afterwards all is as if the prompt had not begun."""
    members = [build_model("llama", seed, num_hidden_layers=100).to(torch.bfloat16) for seed in (0, 1)]
    model = GenARM.from_pretrained(*members, tokenizer=tokenizer, speculation="off")
    prompts, params = [[5, 6] * 100, [7, 8, 9] * 30], {"max_new_tokens": 4, "seed": 1, "ignore_eos": True}
    expected = [output.token_ids for output in model.generate(prompts, **params)]

    def until_the_alarm():
        while True:
            model.generate(prompts, **params)

    for seconds in (0.002, 0.02, 0.04):
        alarm(seconds)
        with pytest.raises(KeyboardInterrupt):
            until_the_alarm()
        assert not model.engine().scheduler
        assert [output.token_ids for output in model.generate(prompts, **params)] == expected


@dtypes
def test_norms_are_read_at_every_call(taken, dtype):
    """The call keeps the norms' tensors, not their addresses."""
    runner = runner_of("qwen3", dtype)
    layer = runner.base_model.layers[1]
    for norm in (layer.post_attention_layernorm, layer.self_attn.q_norm, runner.base_model.norm):
        before = states_of(runner.base_model, [0])[0]
        with torch.no_grad():
            norm.weight *= 2
        assert not torch.equal(states_of(runner.base_model, [0])[0], before)
        taken.clear()
        assert_same(runner.base_model, [0], taken)
        taken.refused = False


def test_other_dtypes_are_not_taken(taken):
    decoder = runner_of("llama", torch.float16).base_model
    taken.clear()
    states_of(decoder, [0])
    assert taken == [None] * len(BLOCKS)


def test_a_core_that_is_turned_off_is_not_called(taken, monkeypatch):
    """Test doubles of devices turn it off after models are loaded."""
    decoder = runner_of("llama", torch.float32).base_model
    taken.clear()
    monkeypatch.setattr(_native, "core", None)
    states_of(decoder, [0])
    assert taken == [None] * len(BLOCKS)


def test_one_norm_of_heads_without_the_other():
    decoder = runner_of("qwen3").base_model
    forward = decoder.forward
    del forward.layers[0].head_norms["key_norm"]
    forward.one_call = OneCall(forward.layers, forward.next_norms, [()])
    with pytest.raises((ValueError, TypeError)):  # raised by rotary_append, which runs after the refused call
        states_of(decoder, [0])
