"""The workspace left by a run changes no token of the next one, belongs to one run at a time, and does not grow."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from against_reference import random_prompts
from cuda_driver import OnCpuTensors, cuda_driver
from doubles import Accesses, Lagging, Recorder, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.device.cuda import Cuda
from genarm_fast.engine import workspace
from genarm_fast.engine.allocate import rounded_capacity
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.speculation.config import Speculation

PARAMS = SamplingParams(max_new_tokens=8, seed=1, ignore_eos=True)


@pytest.fixture
def fresh(tiny_model, tokenizer):
    """A function that returns a new GenARM of the same members at each call."""
    return lambda **options: GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, **options)


def prompts(seed, count=3, longest=30):
    return random_prompts(random.Random(seed), count, longest)


def tokens(model, texts, params=PARAMS, **options):
    return [output.token_ids for output in model.generate(texts, params, **options)]


def left(model):
    """Return the memory addresses of the caches that the model keeps."""
    return [states.data_ptr() for states in caches(model)]


def caches(model):
    return [states for runner in model.engine().executor.runners for states in runner._states()]


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 3), Speculation("ngram", 2)])
def test_calls_give_what_a_new_model_gives(fresh, speculation):
    """The calls are longer and shorter, with more and fewer prompts, with and without the ARM, one after the other."""
    model = fresh(max_batch_size=3)
    for case in range(8):
        rng = random.Random(case)
        texts = prompts(case, rng.randint(1, 5), rng.choice([10, 40, 90]))
        options = {"weights": rng.choice([0.0, 1.0, -0.5]), "seed": case, "speculation": speculation}
        assert tokens(model, texts, **options) == tokens(fresh(max_batch_size=3), texts, **options)


def test_the_next_call_takes_what_the_last_one_left(fresh):
    model = fresh()
    tokens(model, prompts(0))
    before = left(model)
    tokens(model, prompts(1, count=2))
    assert left(model) == before
    tokens(model, prompts(1, count=4))  # needs more slots
    assert left(model) != before
    before = left(model)
    tokens(model, prompts(1, count=1, longest=5), max_new_tokens=100)  # needs longer slots
    assert left(model) != before
    tokens(model, prompts(1))
    before = left(model)
    tokens(model, prompts(1), weights=0.0)  # runs without the ARM
    assert left(model) == before


def test_an_arm_that_nobody_asks_for_takes_no_memory(fresh):
    model = fresh()
    tokens(model, prompts(0), weights=0.0)
    alone = len(left(model))
    tokens(model, prompts(0), weights=1.0)
    assert len(left(model)) == 2 * alone


def test_no_more_rows_at_a_time_than_asked_for(fresh):
    """The limit holds although the caches left behind have more slots."""
    model = fresh(max_batch_size=4)
    tokens(model, prompts(0, count=4))
    model.max_batch_size = 2
    outputs = model.generate(prompts(1, count=4), PARAMS)
    assert max(output.rounds.rounds for output in outputs) == PARAMS.max_new_tokens
    with model.stream(prompts(1, count=4), PARAMS) as stream:
        assert {next(stream).index for _ in range(4)} == {0, 1}


def test_what_is_left_holds_to_cache_bytes(fresh):
    model = fresh()
    tokens(model, prompts(0, count=4))
    taken = model.engine().workspace.bytes
    model.cache_bytes = taken - 1
    tokens(model, prompts(0, count=1))
    assert 0 < model.engine().workspace.bytes < taken


class Small(Lagging):
    """A device with `spare` bytes of memory for caches."""

    def __init__(self, spare):
        super().__init__()
        self.spare = spare

    def spare_bytes(self, device):
        return self.spare


@pytest.mark.parametrize(("room", "slots"), [(2.5, 2), (0.5, 1)])
def test_caches_are_planned_from_what_is_free(fresh, room, slots, caplog):
    """Two of three requests run at a time, or one where not even one fits. None is lost, and a warning says so."""
    texts = [[5 + i] * 20 for i in range(3)]
    expected = tokens(fresh(), texts)
    one = fresh().engine().workspace.token_bytes([0, 1]) * (20 + 8)  # prompt and response
    with engines_on(Small(int(room * one))):
        model = fresh()
        assert tokens(model, texts) == expected
        assert model.engine().workspace.slots == slots
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"KV caches of all that is free hold {slots} of 3 sequences, of 28 tokens each: the others wait"]


def test_a_limit_of_the_user_s_is_no_warning(fresh, caplog):
    """Only the log level INFO mentions it."""
    texts = [[5 + i] * 20 for i in range(3)]
    limit = 2 * 28 * fresh().engine().workspace.token_bytes([0, 1])
    with caplog.at_level("INFO", "genarm_fast.engine.admission"):
        tokens(fresh(cache_bytes=limit), texts)
    (said,) = (record for record in caplog.records if record.name == "genarm_fast.engine.admission")
    assert said.levelname == "INFO"
    assert said.getMessage().startswith(f"KV caches of cache_bytes={limit:,} hold 2 of 3 sequences")


def test_what_a_gpu_has_for_caches():
    """60 GiB are free and PyTorch has cached 6 more; a twentieth of all 80 is reserved for forwards."""
    with cuda_driver():
        assert Cuda().spare_bytes(torch.device("cuda", 0)) == pytest.approx((60 + 6 - 4) * 2**30)


def test_whatever_is_left_in_the_caches(fresh):
    model = fresh(max_batch_size=2)
    texts = prompts(0, count=5)
    expected = tokens(model, texts)
    with torch.inference_mode():
        for states in caches(model):
            states.fill_(torch.nan)
    before = left(model)
    assert tokens(model, texts) == expected
    assert left(model) == before


def test_runs_at_one_time_share_the_caches(fresh):
    model = fresh()
    texts = prompts(0)
    expected = tokens(model, texts)
    with model.stream(texts, PARAMS) as one, model.stream(texts, PARAMS) as other:
        next(one)
        assert tokens(model, texts) == expected
        assert len(list(one)) == len(list(other)) - 1 == PARAMS.max_new_tokens * len(texts) - 1
    assert [output.token_ids for output in one.outputs] == [output.token_ids for output in other.outputs] == expected
    assert len({states.shape[0] for states in caches(model)}) == 1


def test_threads(fresh):
    model = fresh()
    texts = [prompts(i) for i in range(8)]
    expected = [tokens(fresh(), each) for each in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda each: tokens(model, each), texts)) == expected


def test_after_a_stream_was_closed(fresh):
    model = fresh()
    texts = prompts(0)
    expected = tokens(model, texts)
    before = left(model)
    with model.stream(texts, PARAMS) as stream:
        next(stream)
    assert left(model) == before
    assert tokens(model, texts) == expected


def test_an_error_leaves_nothing(fresh, monkeypatch):
    model = fresh()
    texts = prompts(0)
    expected = tokens(model, texts)

    def fail(*_):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr("genarm_fast.engine.model_runner.ModelRunner.forward", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            tokens(model, texts)
    assert not left(model)
    assert tokens(model, texts) == expected


def test_a_failed_row_leaves_nothing_to_the_next(tokenizer):
    """The failed row's numbers in the caches are NaN."""
    broken = build_model("llama", 0)
    with torch.no_grad():
        broken.model.embed_tokens.weight[42] = torch.nan
    model = GenARM.from_pretrained(broken, tokenizer=tokenizer)
    expected = tokens(model, [[5, 6, 7]])
    with pytest.raises(Exception, match="NaN"):
        model.generate([[5, 42, 7, 8, 9]], PARAMS)
    assert all(states.isfinite().all() for states in caches(model))
    assert tokens(model, [[5, 6, 7]]) == expected


def test_what_is_large_is_not_kept(fresh, monkeypatch):
    monkeypatch.setattr(workspace, "MIN_KEPT_BYTES", 0)
    model = fresh()
    tokens(model, prompts(0, count=1, longest=5))
    assert left(model)
    tokens(model, prompts(0, count=16), max_new_tokens=200)
    assert not left(model)


def test_release_and_the_end_of_a_model_free_it(fresh):
    model = fresh()

    def watched(model):
        tokens(model, prompts(0))
        return [weakref.ref(states) for states in caches(model)]

    held = watched(model)
    assert all(cache() is not None for cache in held)
    model.release()
    assert all(cache() is None for cache in held)
    held = watched(model)
    del model
    gc.collect()
    assert all(cache() is None for cache in held)


def test_what_is_too_small_is_freed_before_more_is_made(fresh, monkeypatch):
    model = fresh()
    tokens(model, prompts(0, count=1))
    cache = weakref.ref(caches(model)[0])
    reserve, alive = ModelRunner.reserve, []
    monkeypatch.setattr(ModelRunner, "reserve", lambda *args: alive.append(cache() is not None) or reserve(*args))
    tokens(model, prompts(0, count=4))
    assert alive == [False, False]


def test_capacities_are_few():
    sizes = {rounded_capacity(tokens) for tokens in range(1, 4097)}
    assert len(sizes) < 45
    assert all(tokens <= rounded_capacity(tokens) <= tokens + max(63, tokens / 8) for tokens in range(1, 20000))


def test_the_second_call_captures_nothing(fresh):
    model = fresh()
    expected = [tokens(fresh(), prompts(seed)) for seed in range(4)]
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        assert tokens(model, prompts(0)) == expected[0]
        captures, streams, replays = (len(log.of(kind)) for kind in ("capture", "stream", "replay"))
        assert captures
        for seed in range(1, 4):
            assert tokens(model, prompts(seed)) == expected[seed]
        assert (len(log.of("capture")), len(log.of("stream"))) == (captures, streams)
        assert len(log.of("replay")) > 4 * replays  # no further warm-up runs


def test_shapes_of_rounds_with_drafts_are_captured_once(fresh):
    """The first call captures each shape, as it meets each three times."""
    model = fresh()
    expected = tokens(model, prompts(0))
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        captures = []
        for _ in range(3):
            assert tokens(model, prompts(0), speculation=Speculation("arm", 2)) == expected
            captures.append(len(log.of("capture")))
    assert 0 < captures[0] == captures[2]


def test_a_run_waits_for_what_was_done_before_it(fresh):
    """For example, weights may have changed on the current stream before."""
    model = fresh()
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        tokens(model, prompts(0))
        before = len(log)
        tokens(model, prompts(1))
    waits = [entry for entry in log[before:] if entry[0] == "wait"][:3]
    assert [entry[2] for entry in waits] == ["default"] * 3
    assert {entry[1] for entry in waits} == {entry[1] for entry in log.of("stream")}


def test_graphs_do_not_pile_up(fresh, monkeypatch):
    """The graphs used last are kept."""
    monkeypatch.setattr("genarm_fast.device.cuda.MOST_GRAPHS", 2)
    model = fresh(max_batch_size=4)
    with cuda_driver(), engines_on(OnCpuTensors()) as device:
        for count in (4, 3, 2, 1):
            tokens(model, prompts(0, count))
            assert len(device.graphs) <= 2
        last = list(device.graphs)
        assert {key[1].rows for key in last} == {1, 2}
        tokens(model, prompts(1, 1))
        assert {key for key in last if key[1].rows == 1} < set(device.graphs)


def test_two_runs_on_the_same_streams_are_ordered(fresh):
    model, recorder = fresh(), Recorder()
    with engines_on(recorder), Accesses(recorder):
        for seed in range(2):
            tokens(model, prompts(seed))
    assert recorder.streams == 3
    assert not recorder.found


def tensors():
    return [each for each in gc.get_objects() if type(each) is torch.Tensor]


def test_memory_is_flat_over_calls(fresh):
    model = fresh(max_batch_size=2)
    texts = prompts(0, count=4)
    kept = tensors()  # kept alive, so that no tensor of another test dies between two counts
    with cuda_driver(), engines_on(OnCpuTensors()) as device:
        sizes = []
        for _ in range(4):
            tokens(model, texts)
            gc.collect()
            held = sum(each.nbytes for each in tensors())
            sizes.append((held, len(device.graphs), len(device.calls), len(device.streams)))
    assert sizes[1] == sizes[2] == sizes[3]
    assert sizes[0][0] > sum(each.nbytes for each in kept)
