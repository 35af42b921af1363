"""The CUDA device, driven through a stubbed torch.cuda: what is called, in which order, on which stream."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from against_reference import random_prompts
from cuda_driver import Gpu, OnCpuTensors, cuda_driver
from doubles import engines_on

from genarm_fast import GenARM, SamplingParams
from genarm_fast.device.cuda import TRIES, WARM_UP, Cuda, Graph
from genarm_fast.speculation.config import Speculation

PLAIN = SamplingParams(max_new_tokens=10, seed=1, stop_token_ids=tuple(range(2, 300, 23)))


@pytest.fixture
def model(tiny_model, tokenizer):
    return GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=3)


def run(model, params=PLAIN, speculation="off", count=5):
    prompts = random_prompts(random.Random(5), count)
    return [output.token_ids for output in model.generate(prompts, params, speculation=speculation)]


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 3), Speculation("ngram", 2)])
@pytest.mark.parametrize("changes", [{}, {"logprobs": 1, "rewards": True}, {"repetition_penalty": 1.3}])
def test_tokens_with_replayed_graphs(model, speculation, changes):
    """Each shape is captured once after its warm-up, then only replayed with inputs copied in. The tokens stay the
    same."""
    params = PLAIN.override(**changes)
    expected = run(model, params)
    with cuda_driver() as log, engines_on(OnCpuTensors()) as device:
        assert run(model, params, speculation) == expected
    replays = Counter(entry[1] for entry in log.of("replay"))
    assert len(replays) == len(log.of("capture")) == len(device.graphs) > 0
    assert max(replays.values()) > 3
    assert all(device.calls[key] == WARM_UP + 1 for key in device.graphs)


def test_a_plain_step_is_one_launch(model):
    """The step is captured on the main stream; the backbones' streams fork from it and join it again."""
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        run(model, count=3)
    main, *streams = (entry[1] for entry in log.of("stream"))
    assert len(streams) == 2
    captures = log.captures()
    assert {stream for *_, stream in captures} == {entry[-1] for entry in log.of("replay")} == {main}
    assert len({pool for _, pool, _ in captures}) == 1  # one memory pool for all captures
    # Skip the first six waits: three streams wait for earlier changes of the weights.
    waits = Counter(entry[1:3] for entry in log.of("wait")[6:])
    calls = (WARM_UP + 1) * len(captures)  # replays need no waits, but the first step waits for the prompts
    assert waits == {pair: calls + (pair[0] is main) for s in streams for pair in ((s, main), (main, s))}


@pytest.mark.parametrize("drafter", ["arm", "base", "ngram"])
def test_a_step_with_drafts_is_one_launch(model, drafter):
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        run(model, PLAIN.override(ignore_eos=True, max_new_tokens=24), Speculation(drafter, 2), count=3)
    main = log.of("stream")[0][1]
    assert {stream for *_, stream in log.captures()} == {entry[-1] for entry in log.of("replay")} == {main}
    assert len(log.of("replay")) > 3


def test_a_prompt_waits_for_the_graph_that_writes_to_its_slot(model):
    """A replay is work of the main stream only. The next prompt's stream waits for the replay, and the next step waits
    for the prompt."""
    params = PLAIN.override(ignore_eos=True, max_new_tokens=24)
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        run(model, params, count=4)
    main, *streams = (entry[1] for entry in log.of("stream"))
    last = max(
        i
        for i, entry in enumerate(log)
        if entry[0] == "replay" and ("wait", streams[0], main) in [each[:3] for each in log[i:]]
    )
    after = [entry[1:3] for entry in log[last:] if entry[0] == "wait"]
    assert set(after) >= {pair for s in streams for pair in ((s, main), (main, s))}


def test_replays_run_where_they_were_captured(model):
    """Where the host takes part, each backbone's graphs run on its own stream, with a memory pool of their own."""
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        run(model, PLAIN.override(repetition_penalty=1.3), count=3, speculation=Speculation("arm", 2))
    _, *streams = (entry[1] for entry in log.of("stream"))
    where = {graph: stream for graph, _, stream in log.captures()}
    assert set(where.values()) == set(streams)
    assert all(entry[-1] is where[entry[1]] for entry in log.of("replay"))
    pools = {(stream, pool) for _, pool, stream in log.captures()}
    assert len({pool for _, pool in pools}) == len(pools) == 2


def test_a_replay_copies_what_changed_and_no_more(model):
    """The last step's state and all parameters are already in the memory that the next step reads."""
    copied, call = [], Graph.__call__
    with cuda_driver() as log, engines_on(OnCpuTensors()) as device:

        def counted(graph, *inputs):
            pairs = zip(inputs, graph.inputs, graph.given)
            copied.append(sum(given is not own and given is not seen for given, own, seen in pairs))
            return call(graph, *inputs)

        with patch.object(Graph, "__call__", counted):
            run(model, PLAIN.override(ignore_eos=True, max_new_tokens=20), count=1)
    assert len(device.graphs) == 1
    assert copied[0] > 6  # the first replay copies everything
    assert set(copied[1:]) == {0}
    assert len(copied) == len(log.of("replay")) > 10


def test_a_graph_goes_on_from_what_it_wrote():
    """An input that the graph returned is its own memory; other inputs are copied when another tensor is given."""
    with cuda_driver():
        device = Cuda()
        stream = device.stream(Gpu())

        def add(total, step):
            total.add_(step)
            return total, total * 2

        def call(total, step):
            return device.repeat(stream, "key", add, total, step)

        for _ in range(WARM_UP):
            call(torch.tensor(0), torch.tensor(1))
        given, one = torch.tensor(10), torch.tensor(1)
        total, twice = call(given, one)
        assert (int(given), int(total), int(twice)) == (10, 11, 22)
        again, twice_again = call(total, one)
        assert again is total
        assert (int(total), int(twice), int(twice_again)) == (12, 22, 24)
        one.fill_(100)  # callers must not change an input that they give again
        assert int(call(total, one)[0]) == 13
        assert int(call(total, torch.tensor(5))[0]) == 18
        # The same tensor as before, but another one was copied in since.
        assert int(call(given, torch.tensor(5))[0]) == 15
        assert int(call(given, torch.tensor(0))[0]) == 10


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 3)])
def test_a_text_that_outgrows_its_graph_gets_another(model, speculation):
    """At a KV bound of 128, a graph would attend to no more than 128 tokens."""
    prompt = random_prompts(random.Random(3), 1, 1)[0] * 120
    params = PLAIN.override(ignore_eos=True, max_new_tokens=20)
    expected = model.generate(prompt, params)[0].token_ids
    with cuda_driver(), engines_on(OnCpuTensors()) as device:
        assert model.generate(prompt, params, speculation=speculation)[0].token_ids == expected
    assert [key[1].runners[0][0] for key in device.graphs] == [128, 192]  # 192 is the whole cache


def test_graphs_go_with_the_caches_that_they_use(model):
    with cuda_driver(), engines_on(OnCpuTensors()) as device:
        run(model, count=2)
        assert device.graphs
        model.release()
        assert not device.graphs
        assert not device.calls


def test_few_shapes(tiny_model, tokenizer):
    """Rows and limits come in powers of two, so batches that drain and prompts that grow share their graphs."""
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer, max_batch_size=6)
    prompts = random_prompts(random.Random(2), 12, 40)
    params = [SamplingParams(max_new_tokens=5 + 5 * i, seed=i, ignore_eos=True) for i in range(12)]
    with cuda_driver(), engines_on(OnCpuTensors()) as device:
        tokens = [output.token_ids for output in model.generate(prompts, params, speculation="off")]
    assert {key[1].rows for key in device.graphs} <= {1, 2, 4, 6}
    assert len(device.graphs) <= 4
    assert tokens == [o.token_ids for o in model.generate(prompts, params, speculation="off")]


def test_the_host_waits_once_a_round_for_the_round_before(model):
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        run(model, PLAIN.override(ignore_eos=True), count=3)
    events = [entry[1] for entry in log.of("event")]
    recorded = [entry[1] for entry in log.of("record")]
    assert events == recorded  # the host waits once for each event, in order
    steps = [entry[:2] for entry in log.of("record", "event")]
    ahead = [kind for kind, _ in steps]
    assert ahead == ["record", *["record", "event"] * (len(events) - 1), "event"]


def test_a_forward_that_cannot_be_captured_runs_eagerly(model):
    expected = run(model)
    warned = pytest.warns(UserWarning, match="without a CUDA graph")
    with cuda_driver(captures=False) as log, engines_on(OnCpuTensors()) as device, warned:
        assert run(model) == expected
    assert len(device.eager) == 3
    assert len(log.of("capture")) == 3 * TRIES  # a step and two backbones
    assert not device.graphs


def test_what_is_handed_over_is_kept_for_its_reader(model):
    with cuda_driver() as log, engines_on(OnCpuTensors()):
        run(model, count=2)
    kept = Counter(entry[2] for entry in log.of("keep"))
    waits = [entry[1:3] for entry in log.of("wait")][6:]
    main = log.of("stream")[0][1]
    to_main = sum(target is main for target, _ in waits)
    assert kept[main] == to_main - 2  # one tensor of logits each; the first step waits for the prompts
    assert sum(kept.values()) - kept[main] == 2 * (len(waits) - to_main)  # tokens, positions


def test_between_two_devices_copies_are_ordered_on_both():
    """The source's stream is current on its device and the target's on its own, and the target waits."""
    moved = []

    class Moving:
        def to(self, device, non_blocking=False):
            moved.append((device, non_blocking, list(log.current)))
            return self

    with cuda_driver() as log:
        device = Cuda()
        one, other = (device.stream(Gpu(i)) for i in range(2))
        device.hand_over([Moving()], one, other)
        assert log.of("wait")[-1][1:3] == (other, one)
        assert moved == [(other.device, True, ["default", one, other])]
        cpu = torch.device("cpu")
        device.hand_over([Moving()], one, cpu)
        assert moved[-1] == (cpu, False, ["default", one])  # a blocking copy


def test_a_closed_stream_leaves_nothing_running(model):
    with cuda_driver() as log, engines_on(OnCpuTensors()), model.stream([5, 6], PLAIN) as stream:
        next(iter(stream))
    assert {entry[1] for entry in log[-3:]} == {entry[1] for entry in log.of("stream")}
    assert {entry[0] for entry in log[-3:]} == {"synchronize"}


def test_ranges_that_a_profiler_shows(model, monkeypatch):
    names = Counter()

    @contextmanager
    def span(name):
        names[name] += 1
        yield

    for module in ("device.base", "device.cuda", "engine.step", "engine.step_graph", "engine.engine"):
        monkeypatch.setattr(f"genarm_fast.{module}.span", span)
    forwards = {"base.forward", "arm[0].forward"}
    with cuda_driver(), engines_on(OnCpuTensors()):
        run(model, count=2)
        plain = {
            "step",
            "admit",
            "allocate",
            "prefill",
            "decode",
            *forwards,
            "sample",
            "accept",
            "read-back",
            "deliver",
        }
        assert set(names) == plain
        run(model, speculation=Speculation("arm", 2), count=2)
        assert set(names) == plain | {"draft"}
