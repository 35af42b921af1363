"""Caches never exceed their limit; a request that does not fit fails alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_model, save_adapter

from genarm_fast import GenARM, GenerationError
from genarm_fast.device.base import out_of_memory
from genarm_fast.models.kv_cache import RaggedLayer

TOKEN = 2 * 2 * 2 * 8 * 4  # bytes per token of one member: layers, keys and values, heads, width, float32
PARAMS = {"max_new_tokens": 6, "ignore_eos": True, "seed": 1}


@pytest.fixture
def allocated(monkeypatch):
    """The bytes of each cache layer allocated so far; tests clear the list before a run."""
    made = []
    allocate = RaggedLayer.allocate

    def spy(layer, entry):
        allocate(layer, entry)
        made.append(layer.keys.nbytes + layer.values.nbytes)

    monkeypatch.setattr(RaggedLayer, "allocate", spy)
    return made


def guided(tokenizer, **options):
    models = [build_model("llama", seed) for seed in (0, 1)]
    model = GenARM.from_pretrained(models[0], models[1], tokenizer=tokenizer, **options)
    model.generate([5], max_new_tokens=1)  # the self-check allocates caches too
    return model


PROMPTS = [[5, 6, 7, 8], [9, 8, 7], [6] * 4, [7, 9, 5]]  # at most 10 tokens, 6 of them new


@pytest.mark.parametrize(
    ("cache_bytes", "slots", "tokens"),
    [
        (None, 4, 128),  # with room to spare
        (4 * 128 * TOKEN, 4, 128),
        (4 * 128 * TOKEN - 1, 4, 20),
        (3 * 20 * TOKEN, 3, 20),
        (3 * 20 * TOKEN - 1, 2, 20),
        (20 * TOKEN, 1, 20),
    ],
)
def test_slots_shrink_to_fit(tokenizer, allocated, cache_bytes, slots, tokens):
    """Fewer slots give the same tokens."""
    expected = guided(tokenizer).generate(PROMPTS, **PARAMS)
    model = guided(tokenizer, cache_bytes=cache_bytes)
    allocated.clear()
    outputs = model.generate(PROMPTS, **PARAMS)
    assert sum(allocated) == slots * tokens * TOKEN
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_lanes_are_counted(tmp_path, tokenizer, allocated):
    base = tmp_path / "base"
    build_model("llama", 0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_adapter(tmp_path / "arm", base=base, seed=1)
    model = GenARM.from_pretrained(base, tmp_path / "arm", dtype=torch.float32, cache_bytes=2 * 20 * TOKEN)
    model.generate([5], max_new_tokens=1)
    allocated.clear()
    model.generate(PROMPTS, **PARAMS)
    assert sum(allocated) == 2 * 20 * TOKEN


def test_what_does_not_fit_alone_fails_alone(tokenizer, allocated):
    model = guided(tokenizer, cache_bytes=2 * 20 * TOKEN)
    allocated.clear()
    prompts = [PROMPTS[0], [5] * 50, PROMPTS[1]]
    needed, given = f"{56 * 2 * TOKEN:,}", f"{40 * TOKEN:,}"
    message = rf"^prompts\[1\]: 56 tokens take {needed} bytes of cache: expected at most cache_bytes={given}$"
    with pytest.raises(GenerationError, match=message) as caught:
        model.generate(prompts, **PARAMS)
    assert sum(allocated) == 2 * 20 * TOKEN
    first, failed, last = caught.value.outputs
    assert failed is None
    alone = [guided(tokenizer).generate(prompts[i], **PARAMS)[0].token_ids for i in (0, 2)]
    assert [first.token_ids, last.token_ids] == alone


def test_nothing_fits(tokenizer):
    model = guided(tokenizer, cache_bytes=20 * TOKEN)
    with pytest.raises(GenerationError, match=r"^prompts\[0\]: .*; prompts\[1\]: ") as caught:
        model.generate([[5] * 50, [6] * 60], **PARAMS)
    assert caught.value.outputs == [None, None]


def test_a_stream_goes_on_without_it(tokenizer):
    model = guided(tokenizer, cache_bytes=20 * TOKEN)
    stream = model.stream([[5] * 50, PROMPTS[0]], **PARAMS)
    tokens = []
    with pytest.raises(GenerationError, match=r"^prompts\[0\]: ") as caught:
        tokens += [token for chunk in stream for token in chunk.token_ids]
    assert caught.value.outputs[1].token_ids == guided(tokenizer).generate(PROMPTS[0], **PARAMS)[0].token_ids


@pytest.fixture
def scarce(monkeypatch, allocated):
    """scarce(tokens, error): allocating a layer of more tokens, all slots together, raises the error."""

    def limit(tokens, error):
        allocate = RaggedLayer.allocate

        def fail(layer, entry):
            if layer.slots * layer.capacity > tokens:
                raise error
            allocate(layer, entry)

        monkeypatch.setattr(RaggedLayer, "allocate", fail)

    return limit


@pytest.mark.parametrize(("tokens", "slots"), [(40, 4), (39, 2), (19, 1)])
def test_out_of_memory_halves_the_slots(tokenizer, allocated, scarce, tokens, slots):
    model = guided(tokenizer)
    expected = model.generate(PROMPTS, **PARAMS)
    model.release()
    scarce(tokens, RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"))
    allocated.clear()
    outputs = model.generate(PROMPTS, **PARAMS)
    assert sum(allocated) == slots * 20 * TOKEN
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_out_of_memory_at_one_slot_fails_the_longest(tokenizer, allocated, scarce):
    """The longest requests fail, and the others get as many slots as they would without them."""
    model = guided(tokenizer)
    prompts = [PROMPTS[0], [5] * 50, PROMPTS[1], [6] * 50]
    expected = [model.generate(prompts[i], **PARAMS)[0].token_ids for i in (0, 2)]
    scarce(40, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes"))
    allocated.clear()
    with pytest.raises(GenerationError, match=r"^prompts\[1\]: 56 tokens take .*out of memory; prompts\[3\]") as caught:
        model.generate(prompts, **PARAMS)
    assert sum(allocated) == 2 * 20 * TOKEN
    assert [output and output.token_ids for output in caught.value.outputs] == [expected[0], None, expected[1], None]


def test_other_errors_are_not_taken_for_it(tokenizer, scarce):
    model = guided(tokenizer)
    scarce(0, RuntimeError("no such device"))
    with pytest.raises(RuntimeError, match="no such device"):
        model.generate(PROMPTS, **PARAMS)


def test_what_pytorch_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("value", [0, -1])
def test_refused(tokenizer, value):
    with pytest.raises(ValueError, match=f"cache_bytes={value}: expected an integer >= 1 or None"):
        GenARM.from_pretrained(build_model("llama", 0), tokenizer=tokenizer, cache_bytes=value)


PAIRS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [6], [7, 9, 5]], [[4, 4], [3, 5, 6, 7], [8] * 7, [5, 5]]


@pytest.mark.parametrize(
    ("tokens", "batches"),
    [(None, [4]), (52, [4]), (51, [3, 1]), (29, [2, 2]), (25, [2, 1, 1]), (10, [2, 1, 1])],
)
def test_fewer_are_scored_together(tokenizer, allocated, tokens, batches):
    """Smaller batches give the same numbers. Only one backbone's tokens count: the backbones are scored one after the
    other."""
    limit = None if tokens is None else tokens * TOKEN
    expected = guided(tokenizer).score(*PAIRS)
    model = guided(tokenizer, cache_bytes=limit)
    allocated.clear()
    scores = model.score(*PAIRS)
    made = [sum(allocated[i : i + 2]) for i in range(0, len(allocated), 2)]  # sums over two layers
    assert len(made) == 2 * len(batches)
    assert limit is None or max(made) <= limit
    for mine, other in zip(scores, expected):
        assert mine.base_logprobs == pytest.approx(other.base_logprobs, abs=1e-5)


def test_a_response_that_does_not_fit(tokenizer, allocated):
    model = guided(tokenizer, cache_bytes=20 * TOKEN)
    allocated.clear()
    message = (
        rf"^prompts\[1\]: 54 tokens take {54 * TOKEN:,} bytes of cache: expected at most cache_bytes={20 * TOKEN:,}$"
    )
    with pytest.raises(MemoryError, match=message):
        model.score([[5], [6] * 50], [[4], [3] * 4])
    assert not allocated
