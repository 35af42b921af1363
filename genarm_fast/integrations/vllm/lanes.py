"""LoRA ARMs as lanes of the base's forward: rows are [lanes x N], lane 0 is the bare base.

One read of the base's weights serves all lanes. Each linear adds s B A x on the rows of a lane, and each attention
layer has a key-value cache for each lane. vLLM's own LoRA allows one adapter for each request, and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from string import ascii_lowercase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear, RowParallelLinear

from genarm_fast.integrations.vllm.adapters import lora_tensors
from genarm_fast.integrations.vllm.served import ServedARM

PEFT_PREFIX = "base_model.model."  # beginning of the names of tensors in an adapter's file


class Delta(NamedTuple):
    """One lane's LoRA on some columns of a linear's output. a: [r, in]. b: [out, r], multiplied by s."""

    lane: int
    start: int
    a: Tensor
    b: Tensor


class LaneAttention(nn.Module):
    """An attention layer and a copy for each further lane, with a cache of its own in blocks of the same request."""

    def __init__(self, layers: Sequence[Attention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lanes = len(self.layers)
        rows = zip(self.layers, query.chunk(lanes), key.chunk(lanes), value.chunk(lanes))
        return torch.cat([layer(q, k, v, *args, **kwargs) for layer, q, k, v in rows])


class LaneMethod(LinearMethodBase):
    """Computes a linear by its own method, quantised or not, and adds the lanes' LoRAs.

    deltas: for each lane but the bare one, A [R, in] and B [out, R]; None if its adapter leaves the linear alone.
    """

    def __init__(self, inner: Any, deltas: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        self.inner, self.deltas = inner, deltas

    # vLLM reads settings of the inner method, such as requires_device_loading.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("create_weights: expected before lanes are loaded")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # Not in place: with `y[rows] += ...`, Inductor's code for CPUs (torch 2.13) sometimes gave NaN in some rows.
        lanes = 1 + len(self.deltas)
        first, *rows = self.inner.apply(layer, x, bias).chunk(lanes)
        for i, (delta, own) in enumerate(zip(self.deltas, x.chunk(lanes)[1:])):
            if delta is not None:
                rows[i] = torch.addmm(rows[i], own @ delta[0].t(), delta[1].t())
        return torch.cat([first, *rows])


def packed_delta(parts: Sequence[Delta], width: int) -> tuple[Tensor, Tensor] | None:
    """Return one lane's LoRAs on the parts of a packed linear as one LoRA.

    The A's lie one below another, the B's along the diagonal. This takes two products instead of two for each part. The
    zeros of B are a few per mille of the linear's own weights.
    """
    if not parts:
        return None
    ranks = [len(part.a) for part in parts]
    b = parts[0].b.new_zeros(width, sum(ranks))
    for part, end, rank in zip(parts, accumulate(ranks), ranks):
        b[part.start : part.start + len(part.b), end - rank : end] = part.b
    return torch.cat([part.a for part in parts]), b


@contextmanager
def add_lanes(vllm_config: VllmConfig, lanes: int) -> Iterator[VllmConfig]:
    """Make each attention layer of a model that is made inside the block a `LaneAttention` of 1 + `lanes` layers.

    The further layers get exactly the arguments of the first, so that no soft cap, slope or window is lost.

    Raises:
        ValueError: a kind of attention layer that is not vLLM's plain one.
    """
    if not lanes:
        yield vllm_config
        return
    endpoints = vllm_config.compilation_config.compile_ranges_endpoints
    if endpoints:  # ends of the ranges of row counts that compiled code is made for
        endpoints[-1] *= 1 + lanes
    made = Attention.__init__

    def remembered(self: Attention, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.__dict__["genarm_call"] = (args, kwargs)

    plain = nn.Module.__setattr__

    def laned(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Attention) and not isinstance(self, LaneAttention):
            value = LaneAttention([value, *(_lane_copy(value, letter) for letter in ascii_lowercase[:lanes])])
        plain(self, name, value)

    Attention.__init__, nn.Module.__setattr__ = remembered, laned  # type: ignore[method-assign]
    try:
        yield vllm_config
    finally:
        Attention.__init__, nn.Module.__setattr__ = made, plain  # type: ignore[method-assign]


def _lane_copy(first: Attention, letter: str) -> Attention:
    if type(first) is not Attention:
        raise ValueError(f"LoRA lanes: the base has {type(first).__name__} layers, expected plain attention")
    args, kwargs = first.__dict__["genarm_call"]
    if "prefix" not in kwargs:
        raise ValueError(f"LoRA lanes: the layer {first.layer_name!r} gives no prefix by name")
    # The prefix has a letter, because vLLM reads the layer's number from its name, and expects only one number.
    return Attention(*args, **{**kwargs, "prefix": f"lane_{letter}.{kwargs['prefix']}"})


def load_lanes(base: nn.Module, arms: Sequence[ServedARM]) -> None:
    """Read the adapters and put them into the base's linears.

    Raises:
        ValueError: a tensor of an adapter that no linear takes, or that has another shape.
    """
    packed: Mapping[str, list[str]] = getattr(base, "packed_modules_mapping", {})
    linears = [(name, module) for name, module in base.named_modules() if isinstance(module, LinearBase)]
    deltas: dict[str, list[Delta]] = {}
    for lane, arm in enumerate(arms, 1):
        tensors, scale = lora_tensors(arm.model)
        left = set(tensors)
        for name, module in linears:
            parent, _, leaf = name.rpartition(".")
            parts = [f"{PEFT_PREFIX}{parent}.{part}" for part in packed.get(leaf, [leaf])]
            start = 0
            for index, part in enumerate(parts):
                width = _widths(module)[index] if len(parts) > 1 else _widths(module)[0]
                a, b = f"{part}.lora_A.weight", f"{part}.lora_B.weight"
                if a in tensors and b in tensors:
                    delta = _delta(arm.name, part, module, index, width, tensors[a], tensors[b] * scale)
                    deltas.setdefault(name, []).append(Delta(lane, start, *delta))
                    left -= {a, b}
                start += width
        if left:
            raise ValueError(
                f"{arm.name}: {min(left)} and {len(left) - 1} more tensors of its adapter: expected a linear of the"
                " base that takes each"
            )
    for name, module in linears:
        if name in deltas:
            lanes = [[each for each in deltas[name] if each.lane == lane] for lane in range(1, 1 + len(arms))]
            width = sum(_widths(module))
            module.quant_method = LaneMethod(module.quant_method, [packed_delta(parts, width) for parts in lanes])


def _widths(linear: LinearBase) -> list[int]:
    """Return the columns of this rank's output for each part that is packed into the linear."""
    sizes = getattr(linear, "output_partition_sizes", None)
    return list(sizes) if sizes else [linear.output_size]


def _delta(
    arm: str, part: str, linear: LinearBase, index: int, width: int, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return this rank's slices of A [r, in] and B [out, r], on the linear's device and in its type of activations."""
    wrong = f"{arm}: {part}: LoRA of {a.shape[1]} -> {len(b)}: expected {linear.input_size} -> {linear.output_size}"
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    # Its input is sliced, and the sum over ranks follows.
    if isinstance(linear, RowParallelLinear):
        inputs = linear.input_size_per_partition
        if a.shape[1] != linear.input_size or len(b) != width:
            raise ValueError(wrong)
        a = a[:, rank * inputs : (rank + 1) * inputs]
    else:
        shards = len(b) // width
        replicas = linear.num_kv_head_replicas if isinstance(linear, QKVParallelLinear) and index else 1
        if a.shape[1] != linear.input_size or shards * width != len(b) or shards * replicas not in (1, ranks):
            raise ValueError(wrong)
        if shards > 1:
            own = rank // replicas
            b = b[own * width : (own + 1) * width]
    device = next(linear.parameters()).device
    dtype = linear.params_dtype
    return a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous()
