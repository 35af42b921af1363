"""CUDA tensors without CUDA: PyTorch's fake tensors, which have a device and a shape, but no numbers.

Code that runs on them treats devices as it would on any GPU: an operation that mixes them with a CPU tensor raises, and
so does a read on the host.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from cuda_driver import cuda_driver, pinned
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

from genarm_fast import GenARM
from genarm_fast.device.cuda import Cuda
from genarm_fast.engine import selfcheck, workspace
from genarm_fast.engine.step import Steps
from genarm_fast.models.known_decoders import Norm
from genarm_fast.models.stacked_decoder import stacks_by_address

CUDA = torch.device("cuda", 0)
OURS = ("genarm_fast.kernels", "genarm_fast.models.stacked_decoder")
READS = [getattr(Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu")]


class Indexing(TorchFunctionMode):
    """A mode that indexes fake CUDA tensors by other operations, as Python's own asks for the driver. Reads on the host
    raise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
        assert not (on_device and func in READS), f"the host reads a tensor on the device: {func.__name__}"
        if on_device and func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        if not on_device or func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        tensor, key, *value = args
        key = key if isinstance(key, tuple) else (key,)
        view, indices = basic(tensor, key)
        if not value:
            return torch.ops.aten.index(view, indices) if any(i is not None for i in indices) else view
        new = value[0] if isinstance(value[0], Tensor) else torch.full((), value[0], dtype=view.dtype, device=CUDA)
        if any(i is not None for i in indices):
            view.index_put_(indices, new)
        else:
            torch.ops.aten.copy_.default(view, new)
        return None


def basic(tensor: Tensor, key: tuple[Any, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """Return the view that a key's slices and integers select, and the tensors that index this view."""
    plain = tuple(slice(None) if isinstance(each, Tensor) else each for each in key)
    with torch._C.DisableTorchFunction():
        like = torch.empty_strided(tensor.shape, tensor.stride(), device="meta", dtype=tensor.dtype)[plain]
    view = torch.as_strided(tensor, like.shape, like.stride(), tensor.storage_offset() + like.storage_offset())
    named = sum(each is not Ellipsis and not isinstance(each, int) for each in key)
    indices: list[Tensor | None] = []
    for each in key:
        if each is Ellipsis:
            indices += [None] * (view.dim() - named)
        elif not isinstance(each, int):
            indices.append(each if isinstance(each, Tensor) else None)
    return view, indices


def read(tensors: Any) -> Any:
    """Return what the host reads of a step: every token is 5, every status 0, and the last tensor says one token was
    accepted."""
    with unset_fake_temporarily():
        host = [torch.full(each.shape, 0 if each.dtype == torch.int32 else 5).to(each.dtype) for each in tensors]
        host[-1] = torch.ones_like(host[-1])
    return lambda: host


class FakeCuda:
    """`with FakeCuda() as fake`: stand-ins for CUDA's streams, launches and pinned memory, and fake tensors.

    launched: names of the Triton kernels launched so far; all their tensors were on the device.
    """

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.mode = FakeTensorMode()
        self._made: dict[int, Any] = {}

    def __enter__(self) -> FakeCuda:
        self._stack = ExitStack()
        enter = self._stack.enter_context
        enter(cuda_driver())
        enter(patch.object(JITFunction, "run", lambda kernel, *args, **options: self._launch(kernel, args, options)))
        enter(patch.object(Cuda, "read", lambda _, tensors, stream: read(tensors)))
        enter(patch.object(Steps, "finish", _outside(Steps.finish)))
        # Return another tensor, as pinning does. PyTorch would compute a fake tensor of known numbers for real.
        enter(patch.object(Tensor, "pin_memory", lambda t: torch.empty(tuple(pinned(t).shape), dtype=t.dtype)))
        enter(patch.object(torch.cuda, "device", lambda _: nullcontext()))
        for mode in (torch.inference_mode(), self.mode, Indexing()):
            enter(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _launch(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        for value in (*args, *options.values()):
            for each in value if isinstance(value, tuple) else (value,):
                assert not isinstance(each, Tensor) or each.device == CUDA, f"{kernel.__name__}: {each.device}"
        self.launched.append(kernel.__name__)

    def fake(self, value: Any) -> Any:
        """Move a tensor, or all tensors of a module or container, to the fake device. The same tensor gives the same
        fake."""
        if isinstance(value, Tensor):
            if id(value) not in self._made:
                with self.mode:
                    made = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                self._made[id(value)] = (nn.Parameter(made, False) if isinstance(value, nn.Parameter) else made), value
            return self._made[id(value)][0]
        if isinstance(value, nn.Module):
            for module in value.modules():
                for name, each in vars(module).items():
                    if name != "_modules":
                        vars(module)[name] = self.fake(each)
            return value
        if isinstance(value, dict):
            return type(value)((key, self.fake(each)) for key, each in value.items())
        if isinstance(value, (list, tuple)):
            made = [self.fake(each) for each in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, Norm):
            return replace(value, weight=self.fake(value.weight))
        if type(value).__module__.startswith(OURS):  # such as a prepared linear
            for name in getattr(type(value), "__slots__", None) or list(vars(value)):
                setattr(value, name, self.fake(getattr(value, name)))
        return value

    @contextmanager
    def model(self, model: GenARM):
        """Yield the model with all weights on the fake device. It cannot run on the CPU afterwards."""
        found = {tuple(map(id, members)): selfcheck.entries_of(members) for members in _groups(model)}
        for member in model.members:
            member.watch, member.given = None, False
            for each in {id(m): m for m in (member.model, member.shared, member.runner)}.values():
                self.fake(each)

        def entries(members: Any) -> Any:
            known = found[tuple(map(id, members))]
            return [entry and entry._replace(device=CUDA) for entry in known]

        model._engine = None
        stacks_by_address.clear()  # its keys are addresses of memory that is freed now
        with patch.object(selfcheck, "entries_of", entries), patch.object(workspace, "entries_of", entries):
            yield model


def _groups(model: GenARM) -> list[Any]:
    return [runner.members for runner in model.engine().executor.runners]


def _outside(function: Any) -> Any:
    """Wrap the function to run outside the fake mode, on real tensors, as the host's own work does."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call
