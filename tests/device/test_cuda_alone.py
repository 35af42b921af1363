"""The CUDA device by itself, through a stubbed torch.cuda: cases that decoding on one GPU never reaches."""

from __future__ import annotations

import threading
import warnings
from itertools import count

import pytest
import torch
from cuda_driver import FakeStream, Gpu, cuda_driver, pinned

from genarm_fast.device.base import out_of_memory
from genarm_fast.device.cuda import MOST_GRAPHS, TRIES, WARM_UP, Cuda, on

CPU = torch.device("cpu")


@pytest.fixture
def log():
    with cuda_driver() as log:
        yield log


@pytest.fixture
def device(log):
    return Cuda()


@pytest.fixture
def stream(device):
    """A stream with the CPU as its device, so that copies to it run."""
    made = device.stream(Gpu())
    made.device = CPU
    return made


def test_a_member_on_the_cpu_has_no_stream(device, log):
    assert device.stream(CPU) is CPU
    assert device.streams == []
    assert log.of("stream") == []


def test_what_a_member_on_the_cpu_gives_is_uploaded(device, stream, log, monkeypatch):
    """The upload uses pinned memory on the stream that reads it. No stream waits, because the CPU's work is done."""
    where = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: where.append(log.current[-1]) or pinned(t))
    given = [torch.arange(3), torch.zeros(2).expand(2, 2)]
    before = len(log.of("wait"))
    got = device.hand_over(given, CPU, stream)
    assert [each.tolist() for each in got] == [each.tolist() for each in given]
    assert where == [stream, stream]
    assert len(log.of("wait")) == before


def test_what_a_member_on_the_cpu_gets_is_there(device, stream, log):
    """The CPU gets a blocking copy, ordered after the source's work."""
    tensor = torch.arange(3)
    (got,) = device.hand_over([tensor], stream, CPU)
    assert got is tensor
    assert device.upload(tensor, CPU) is tensor
    assert device.read([tensor], CPU)() == [tensor]
    assert log.of("record", "event") == []


def test_a_member_on_the_cpu_runs_where_it_is_and_is_never_captured(device, log):
    calls = []

    def function(x):
        calls.append(log.current[-1])
        return (x + 1,)

    for _ in range(WARM_UP + 3):
        (got,) = device.launch(CPU, "arm", device.repeat, CPU, "key", function, torch.zeros(1))
        assert got.item() == 1
    assert calls == ["default"] * (WARM_UP + 3)
    assert device.graphs == {}


def test_time_on_the_cpu_and_on_a_stream(device, stream, monkeypatch):
    now = iter([1.0, 3.5])
    monkeypatch.setattr(device, "clock", lambda: next(now))
    assert device.elapsed(device.mark(CPU), device.mark(CPU)) == 2.5
    start, end = device.mark(stream), device.mark(stream)
    assert device.elapsed(start, end) == 0.001  # the stub's events are a millisecond apart


def captured(device, stream, key, function=lambda x: (x + 1,), count=WARM_UP + 1):
    for _ in range(count):
        (got,) = device.repeat(stream, key, function, torch.zeros(1))
    return got


def test_only_the_latest_graphs_are_kept(device, stream):
    device.most_graphs = 2
    for key in ("a", "b"):
        captured(device, stream, key)
    captured(device, stream, "a", count=1)  # makes "b" the oldest
    captured(device, stream, "c")
    assert [key for _, key in device.graphs] == ["a", "c"]


def test_graphs_that_requests_will_need_are_kept_for_good(device, stream):
    with device.keeping_graphs():
        for key in range(MOST_GRAPHS + 3):
            captured(device, stream, key)
    assert len(device.graphs) == device.most_graphs == MOST_GRAPHS + 3
    captured(device, stream, "one more")
    assert len(device.graphs) == MOST_GRAPHS + 3
    assert (stream, 0) not in device.graphs


def test_graphs_of_memory_that_is_freed_are_forgotten(device, stream):
    """The graphs of one stream are forgotten; a shape there has to warm up again."""
    other = device.stream(Gpu())
    for each in (stream, other):
        captured(device, each, "key")
    device.forget(stream)
    assert list(device.graphs) == [(other, "key")]
    captured(device, stream, "key", count=WARM_UP)
    assert list(device.graphs) == [(other, "key")]
    captured(device, stream, "key", count=1)
    assert (stream, "key") in device.graphs


def test_a_capture_without_memory_is_the_caller_s(device, stream):
    """The engine shrinks the batch; the stream does not count as one that can't be captured."""
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) == WARM_UP + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x + 1,)

    captured(device, stream, "key", function, WARM_UP)
    with pytest.raises(torch.OutOfMemoryError):
        captured(device, stream, "key", function, 1)
    assert device.eager == set()
    assert captured(device, stream, "key", function, 1).item() == 1
    assert (stream, "key") in device.graphs


def test_graphs_of_a_stream_share_a_pool(device, stream, log):
    for key in ("a", "b"):
        captured(device, stream, key)
    assert len({entry[2] for entry in log.of("capture")}) == 1


def test_a_replay_reads_its_own_inputs(device, stream):
    captured(device, stream, "key")
    given = torch.full((1,), 41.0)
    (got,) = device.repeat(stream, "key", None, given)
    (later,) = device.repeat(stream, "key", None, given + 1)
    assert (given.item(), got.item(), later.item()) == (41, 42, 43)  # earlier results are copies and stay


def test_on_a_device_nothing_changes(log):
    with on(CPU):
        assert log.current == ["default"]


def test_few_shapes_exist(device):
    assert device.shape(5, 16, 100, 4096) == (8, 128)
    assert device.shape(5, 6, 129, 200) == (6, 200)
    assert device.shape(1, 6, 257, 4096) == (1, 512)


def test_no_two_engines_have_one_stream(log, monkeypatch):
    """PyTorch hands out 32 streams in turn. A capture would record what another engine launches on its stream."""
    handles = count()

    class Pooled(FakeStream):
        def __init__(self, device):
            super().__init__(log, device)
            self.handle = next(handles) % 4

        def __eq__(self, other):
            return self.handle == getattr(other, "handle", None)

        def __hash__(self):
            return self.handle

    monkeypatch.setattr(torch.cuda, "Stream", Pooled)
    engine = Cuda()

    def made(device):
        log.clear()  # the log keeps streams alive
        return device.stream(Gpu()).handle

    assert [made(engine), made(engine)] == [0, 1]
    assert {made(Cuda()) for _ in range(9)} == {2, 3}
    others = [Cuda() for _ in range(4)]
    assert {made(each) for each in others} >= {2, 3}  # once streams run out, some engines share one


def test_a_capture_begins_where_no_product_runs(device, stream, log):
    """A graph that goes frees cuBLAS's memory of the stream its capture began on, under all other graphs too."""
    device.most_graphs = 1
    for key in ("a", "b"):  # the driver finds products of a living graph that lose their memory
        captured(device, stream, key)
    forks = [entry[1:3] for entry in log.of("fork")]
    origin = forks[0][1]
    assert forks == [(stream, origin), (origin, stream)] * 2
    assert origin not in device.streams


def test_the_pool_of_graphs_that_are_gone_takes_no_other(device, stream, log):
    """PyTorch drops a pool without graphs, but does not notice while memory of the pool is alive."""
    captured(device, stream, "key")
    device.forget(stream)
    captured(device, stream, "key")
    assert len({pool for _, pool, _ in log.captures()}) == 2
    device.most_graphs = 1
    captured(device, device.stream(Gpu()), "key")  # leaves no graph of the first stream
    captured(device, stream, "other")


@pytest.mark.parametrize("error", [RuntimeError("a host read"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_capture_that_fails_is_over(device, stream, log, error):
    """PyTorch's allocator has to be told too, and the driver checks that. Later captures use another pool."""
    calls = []

    def function(x):
        calls.append(log.current[-1])
        if len(calls) == WARM_UP + 1:
            raise error
        return (x + 1,)

    device.failures[stream] = TRIES - 1
    captured(device, stream, "before")
    captured(device, stream, "key", function, WARM_UP)
    with pytest.raises(type(error)) if out_of_memory(error) else pytest.warns(match="without a CUDA graph"):
        device.launch(stream, "forward", captured, device, stream, "key", function, 1)
    assert log.current == ["default"]
    assert set(calls[WARM_UP:]) == {stream}  # the function runs there without a graph too
    assert device.eager == (set() if out_of_memory(error) else {stream})
    device.eager.clear()
    captured(device, stream, "another")
    assert [pool for _, pool, _ in log.captures()] == [0, 0, 1]


def test_what_pytorch_has_released_is_not_released_twice(device, stream, monkeypatch):
    """A later PyTorch notices that a capture has failed, and then reports that none is under way."""
    end, released = torch._C._cuda_endAllocateToPool, []

    def over(index, pool):
        end(index, pool)
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", over)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: released.append(given))

    def function(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    captured(device, stream, "key", count=WARM_UP)
    with pytest.raises(torch.OutOfMemoryError):
        captured(device, stream, "key", function, 1)
    assert released == []


def test_a_capture_that_another_thread_broke_is_tried_again(device, stream):
    """Another thread may wait for the whole device, for example. A model without graphs would stay slow."""
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) == WARM_UP + 1:
            raise RuntimeError("operation failed due to a previous error during capture")
        return (x + 1,)

    with warnings.catch_warnings(action="error"):
        assert captured(device, stream, "key", function).item() == 1
        assert captured(device, stream, "key", function, 1).item() == 1
    assert (stream, "key") in device.graphs
    assert not device.eager


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_capture_is_the_caller_s(device, stream, error):
    """Ending the capture then fails, with an error that must not replace the interrupt."""
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) > WARM_UP:
            raise error
        return (x + 1,)

    with pytest.raises(error):
        captured(device, stream, "key", function)
    assert device.eager == set()


def test_a_thread_runs_a_shape_once_before_it_captures(device, stream, log):
    """cuBLAS makes a handle per thread, which fails inside a capture. Threads take turns at an engine's steps."""
    captured(device, stream, "key", count=WARM_UP)
    for captures in (0, 1):
        thread = threading.Thread(target=captured, args=(device, stream, "key"), kwargs={"count": captures + 1})
        thread.start()
        thread.join()
        assert len(log.of("capture")) == captures


def test_captures_of_two_threads_wait_for_each_other(log):
    """Two engines share a GPU. Each capture begins by waiting for the device, which a capture under way forbids."""
    inside, go = threading.Event(), threading.Event()

    def slow(x):
        if log.of("capture"):
            inside.set()
            go.wait(5)
        return (x + 1,)

    def decode(function):
        device = Cuda()
        captured(device, device.stream(Gpu()), "key", function)

    threads = [threading.Thread(target=decode, args=(slow,)), threading.Thread(target=decode, args=(lambda x: (x,),))]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    threads[1].join(0.2)
    assert len(log.of("capture")) == 1
    go.set()
    for thread in threads:
        thread.join()
    assert len(log.of("capture")) == 2
