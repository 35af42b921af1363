"""Known calls of guided_sample, under TRITON_INTERPRET=1: they launch kept kernels with new addresses and numbers."""

import ctypes
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from genarm_fast.kernels import guided_sample_reference
from genarm_fast.kernels.guided_sample import triton_known
from genarm_fast.kernels.guided_sample.arguments import SamplingArguments

launcher = sys.modules["genarm_fast.kernels.guided_sample.triton"]
KERNELS = ("scores_kernel", "bound_kernel", "collect_kernel", "draw_kernel")


class Compiled:
    """Stands for Triton's CompiledKernel. It takes addresses in place of the tensors of the first launch."""

    def __init__(self, kernel, values, options, log):
        self.kernel, self.first, self.options, self.log = kernel, values, options, log
        self.function, self.packed_metadata = "function", "metadata"

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        assert (stream, function, metadata) == (77, "function", "metadata")
        assert len(values) == len(self.first)
        self.log.append(self.kernel.__name__)
        self.kernel[x, y, z](*map(tensors_at, values, self.first), **self.options)

    def __getitem__(self, grid):
        return lambda *values, stream: self.run(*grid, stream, "function", "metadata", None, None, None, *values)


def tensors_at(value, like):
    if isinstance(like, tuple):
        return tuple(map(tensors_at, value, like))
    if isinstance(like, torch.Tensor):
        assert type(value) is int
        size = like.untyped_storage().nbytes() - like.storage_offset() * like.itemsize  # the interpreter copies all
        return torch.frombuffer((ctypes.c_byte * size).from_address(value), dtype=like.dtype) if size else like
    assert type(value) is type(like)
    return value


class Kernel:
    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        def launch(*values, **options):
            self.kernel[grid](*values, **options)
            return Compiled(self.kernel, values, options, self.log)

        return launch


@pytest.fixture
def launched(monkeypatch):
    """Return the list to which the names of kernels are added that a known call launches."""
    log = []
    for name in KERNELS:
        monkeypatch.setattr(launcher, name, Kernel(getattr(launcher, name), log))
    active = SimpleNamespace(
        get_current_target=lambda: SimpleNamespace(backend="cuda"),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 77,
    )
    monkeypatch.setattr(triton_known, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_known, "_known", {})
    return log


def arguments(seed, shape=(2,), arms=1, vocab=1500, **options):
    generator = torch.Generator().manual_seed(seed)
    base, *rest = (3 * torch.randn(*shape, vocab, generator=generator) for _ in range(arms + 1))
    rows = torch.arange(shape[0])
    defaults = {"weights": torch.rand(shape[0], arms, generator=generator), "seeds": rows + seed, "positions": rows}
    return SamplingArguments(base, tuple(rest), **(defaults | options))


def assert_known(first, later, launched):
    """After `first`, both `first` and `later` are known calls, and their tokens and log-probs are the reference's."""
    assert triton_known.known(*first) is None
    launcher.launch(first, triton_known.remember)
    assert launched == []
    for call in (later, first):
        got = triton_known.known(*call)
        assert got is not None
        expected = guided_sample_reference(*call[:3], **{name: getattr(call, name) for name in call._fields[3:]})
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.status.tolist() == expected.status.tolist()
        if expected.logprobs is not None:
            torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=2e-6, atol=2e-5)
            torch.testing.assert_close(got.member_logprobs, expected.member_logprobs, rtol=2e-6, atol=2e-5)
    assert len(launched) in (4, 8)


ROWS = {"temperature": torch.tensor([0.5, 1.2]), "top_k": torch.tensor([0, 40]), "top_p": torch.tensor([0.8, 1.0])}


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({}, {}),
        (ROWS, {**ROWS, "top_p": torch.tensor([1.0, 0.3])}),
        ({"return_logprobs": True, "arms": 2}, {"return_logprobs": True, "arms": 2}),
        ({"logit_bias": torch.zeros(1500)}, {"logit_bias": torch.linspace(-9, 9, 1500)}),
        ({"weights": [0.5], "seeds": 7, "positions": 3}, {"weights": [2], "seeds": 1, "positions": 16}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature": 2, "top_k": 900, "top_p": 1.0}),
        ({"seeds": 2**64 - 1, "min_p": 0.1}, {"seeds": 2**40, "min_p": 0.7}),
        ({"shape": (2, 3), "arms": 0}, {"shape": (2, 3), "arms": 0}),
    ],
)
def test_other_values(first, later, launched):
    assert_known(arguments(1, **first), arguments(2, **later), launched)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": (3,)},
        {"vocab": 1501},
        {"arms": 2},
        {"vocab_size": 1000},
        {"return_logprobs": True},
        {"top_logprobs": 1},
        {"logit_bias": torch.zeros(1500)},
        {"temperature": torch.ones(2)},
        {"temperature": torch.ones(2, dtype=torch.float64)},
        {"temperature": True},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.5},
        {"top_k": -1},
        {"top_k": 2.0},
        {"min_p": 1.5},
        {"seeds": -1},
        {"positions": 2**31},  # the kernel takes it as int64, and took 3 as int32
        {"positions": 2**32},
        {"positions": 1.0},
        {"weights": [0.5]},
        {"weights": [[0.5], [0.5]]},
        {"weights": torch.ones(2, 2)[:, :1]},
        {"weights": torch._neg_view(torch.ones(2, 1))},
        {"base_logits": torch.zeros(2, 1500, dtype=torch.bfloat16)},
        {"base_logits": torch.zeros(2, 1600)[:, :1500]},
        {"base_logits": torch.zeros(3001)[1:].view(2, 1500)},  # its address is no multiple of 16
        {"base_logits": torch.zeros(2, 1500).as_subclass(torch.nn.Parameter)},
        {"base_logits": None},
        {"arm_logits": (None,)},
    ],
)
def test_what_is_not_known(changed, launched):
    """A call that differs in anything that checks or compiled kernels depend on goes through all checks."""
    call = {"temperature": 0.7, "positions": 3}
    launcher.launch(arguments(1, **call), triton_known.remember)
    assert triton_known.known(*arguments(2, **call)) is not None
    direct = {name: changed[name] for name in ("base_logits", "arm_logits") if name in changed}
    options = call | {name: value for name, value in changed.items() if name not in direct}
    assert triton_known.known(*arguments(1, **options)._replace(**direct)) is None


def test_what_is_not_kept(launched, monkeypatch):
    """Calls with converted arguments, on other devices, or with kernels of other backends are not kept."""
    launcher.launch(arguments(1, seeds=torch.arange(2, dtype=torch.int32)), triton_known.remember)
    launcher.launch(arguments(1, weights=torch.ones(2, 1, dtype=torch.float64)), triton_known.remember)
    launcher.launch(arguments(1, weights=torch._neg_view(torch.ones(2, 1))), triton_known.remember)
    launcher.launch(arguments(1, logit_bias=torch.ones(1500, dtype=torch.float64)), triton_known.remember)
    launcher.launch(arguments(1, shape=(0,)), triton_known.remember)
    target = triton_known.driver.active.get_current_target
    monkeypatch.setattr(triton_known.driver.active, "get_current_target", lambda: SimpleNamespace(backend="hip"))
    launcher.launch(arguments(1), triton_known.remember)
    assert not triton_known._known
    monkeypatch.setattr(triton_known.driver.active, "get_current_target", target)
    launcher.launch(arguments(1), triton_known.remember)
    monkeypatch.setattr(triton_known.driver.active, "get_current_device", lambda: 1)
    assert triton_known.known(*arguments(1)) is None


@pytest.mark.parametrize("shape", [(65535,), (8192, 8), (2, 32768)])
def test_no_grid_has_more_rows_than_cuda_allows(launched, monkeypatch, shape):
    """CUDA allows 65,535 programs in a grid's second and third dimension."""
    grids = []
    for name in KERNELS:
        kernel = type("Grids", (), {"__getitem__": lambda self, grid: grids.append(grid) or (lambda *_, **__: None)})
        monkeypatch.setattr(launcher, name, kernel())
    base = torch.zeros(*shape, 3)
    call = SamplingArguments(
        base, (), torch.zeros(shape[0], 0), torch.tensor(1), torch.tensor(0), top_p=torch.tensor(0.5)
    )
    found = launcher.launch(call)
    assert (found is None) == (not grids) == (shape != (65535,))
    assert all(max(grid[1:]) <= 65535 for grid in grids)


def test_kernels_are_kept_for_the_device_that_loaded_them(launched, monkeypatch):
    """That device is the tensors' device, which is the current device only while the kernels are launched."""
    current = [0]

    @contextmanager
    def launching_on(_):
        current[0] = 1
        yield
        current[0] = 0

    monkeypatch.setattr(triton_known.driver.active, "get_current_device", lambda: current[0])
    monkeypatch.setattr(launcher, "launching_on", launching_on)
    launcher.launch(arguments(1), triton_known.remember)
    assert triton_known.known(*arguments(1)) is None
    current[0] = 1
    assert triton_known.known(*arguments(1)) is not None


def test_memory_of_signatures_is_bounded(launched, monkeypatch):
    monkeypatch.setattr(triton_known, "MOST", 2)
    for rows in (1, 2, 3):
        launcher.launch(arguments(1, shape=(rows,), vocab=20), triton_known.remember)
    assert len(triton_known._known) == 1


def test_a_profiler_s_hooks_are_told(launched, monkeypatch):
    launcher.launch(arguments(1), triton_known.remember)
    told = []
    monkeypatch.setattr(Compiled, "__getitem__", lambda self, grid: lambda *_, **__: told.append(self.kernel.__name__))
    hook = triton_known.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        triton_known.known(*arguments(1))
    finally:
        hook.remove(print)
    assert told == ["scores_kernel", "draw_kernel"]
