"""The decoder of Llama, Mistral, Qwen2 and Qwen3 in nine launches a layer, for GPUs.

Linears of one input are one product, whose weight holds the A of every LoRA lane as extra rows. The kernel that reads
the product next applies B (`genarm_fast.kernels.add_rms_norm` and others). No part of a forward needs the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from genarm_fast.kernels import Lanes
from genarm_fast.kernels.gated_mul import gated_mul
from genarm_fast.kernels.linear import Lora
from genarm_fast.kernels.ragged_attention import ragged_attention
from genarm_fast.kernels.rotary_append import rotary_append
from genarm_fast.kernels.small_linear import SmallLinear
from genarm_fast.models.few_rows import choose, few_rows_linear, serves
from genarm_fast.models.forward_context import current_positions, running_lanes
from genarm_fast.models.known_decoders import WINDOWS, Norm, Output, family_of, lanes_of, over_layers
from genarm_fast.models.kv_cache import Entry
from genarm_fast.models.lora_lanes import LaneLinear
from genarm_fast.models.weights import Movable

stacks_by_address: WeakValueDictionary[int, Stack] = (
    WeakValueDictionary()
)  # stacks by the address of their weight's memory


class StackedDecoder:
    """The forward of a decoder (a model without its head) over our cache. It takes the place of `decoder.forward`.

    The linears' parameters become views of the stacked weights, so changes in place count. Where they are already views
    of another decoder's stacks, this decoder shares those stacks. A and B of the lanes are copies, which `reread`
    updates. movable: the parameters that move together with the linears'.
    """

    @torch.inference_mode(False)  # the owner of a given model may train it
    @torch.no_grad()
    def __init__(self, decoder: Any, movable: Movable) -> None:
        window = WINDOWS[family_of(decoder)]
        self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
        self.adapter_by_lane = {lane: i for i, lane in enumerate(lanes_of(decoder))}
        self.layers = [_StackedLayer(layer, self.adapter_by_lane, window, movable) for layer in decoder.layers]
        norms = [layer.norm for layer in self.layers[1:]]
        self.next_norms = [*norms, _norm(decoder.norm)]
        self._adapters: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, input_ids: Tensor, position_ids: Tensor, past_key_values: Cache, **_: Any) -> Output:
        """Run the decoder. input_ids, position_ids: int64 [N, q]."""
        hidden = self.embed(input_ids)
        cos, sin = self.rotary(hidden, position_ids=position_ids)
        where, adapters = current_positions(hidden.device), self._running_adapters(hidden.device)
        x = self.layers[0].norm(hidden)
        for layer, next_norm, cache in zip(self.layers, self.next_norms, past_key_values.layers):
            hidden, x = layer(hidden, x, cos, sin, cache, where, adapters, next_norm)
        return Output(x, past_key_values)

    def of_layers(self, kept: Sequence[int]) -> Callable[..., Output]:
        """Return a forward that runs only the layers `kept`, over the same cache."""
        part = copy.copy(self)
        part.layers = [self.layers[i] for i in kept]
        part.next_norms = [*(layer.norm for layer in part.layers[1:]), self.next_norms[-1]]
        return over_layers(part, kept)

    def _running_adapters(self, device: torch.device) -> Tensor | None:
        """Return the adapter number of each running lane, or -1; int64 [lanes], uploaded once for each set of lanes."""
        if not self.adapter_by_lane:
            return None
        lanes = tuple(running_lanes()[0])
        if lanes not in self._adapters:
            self._adapters[lanes] = torch.tensor([self.adapter_by_lane.get(lane, -1) for lane in lanes], device=device)
        return self._adapters[lanes]

    @torch.inference_mode()
    def reread(self) -> None:
        """Copy the current A and B of the lanes."""
        for product in self.products:
            product.reread()

    @property
    def products(self) -> list[Product]:
        return [each for layer in self.layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    def choose_kernels(self) -> str:
        """Measure which kernels multiply few rows, as `few_rows.choose` says."""
        return choose([product for product in self.products if product.owns_stack or not product.rank])

    @property
    def shares_stacks(self) -> bool:
        """Whether some weights were stacked for another decoder, and are shared."""
        return not all(product.owns_stack for product in self.products)


class _StackedLayer:
    def __init__(
        self, layer: Any, adapter_by_lane: Mapping[int, int], window: Callable[[Any], int | None], movable: Movable
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.second_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.head_norms: dict[str, Any] = {}
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm), _norm(attention.k_norm)
            self.head_norms = {"query_norm": query.weight, "key_norm": key.weight, "eps": query.eps}
        self.qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj], adapter_by_lane, movable)
        self.o, self.down = (
            Product([attention.o_proj], adapter_by_lane, movable),
            Product([mlp.down_proj], adapter_by_lane, movable),
        )
        self.gate_up = Product([mlp.gate_proj, mlp.up_proj], adapter_by_lane, movable)
        self.width, self.scale, self.window = attention.head_dim, attention.scaling, window(attention)
        self.kv_heads = self.qkv.widths[1] // self.width

    def __call__(
        self, hidden: Tensor, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, where: Any, adapters: Tensor | None,
        next_norm: Norm,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the residual stream after this layer, and the next layer's input."""
        if not cache.is_initialized:
            cache.allocate(Entry(self.kv_heads, (self.width, self.width), hidden.dtype, hidden.device))
        keys, values, slots, positions = cache.keys, cache.values, where.slots, where.positions
        query = rotary_append(
            self.qkv(x), cos, sin, keys, values, slots, positions, lanes=self.qkv.lanes(adapters), **self.head_norms
        )
        y = ragged_attention(
            query.transpose(1, 2), keys, values, slots, positions,
            scale=self.scale, window=self.window, limit=where.kv_bound, arrivals=where.arrivals,
        )  # fmt: skip
        hidden, x = self.second_norm.of_sum(hidden, self.o(y.flatten(2)), self.o.lanes(adapters))
        y = gated_mul(self.gate_up(x), lanes=self.gate_up.lanes(adapters))
        return next_norm.of_sum(hidden, self.down(y), self.down.lanes(adapters))


class Stack:
    """The weights of linears of one input, one below the other, then the A of the lanes of the first decoder.

    Decoders over the same weights share the stack that the first one made. It lives as long as any of them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        stacks_by_address[weight.untyped_storage().data_ptr()] = self

    def holds(self, linears: Sequence[Any]) -> bool:
        """Whether the stack begins with these linears, in this order."""
        size = sum(len(linear.weight) for linear in linears)
        spans = self.weight[:size].split([len(linear.weight) for linear in linears])
        return all(
            span.shape == linear.weight.shape and span.data_ptr() == linear.weight.data_ptr()
            for span, linear in zip(spans, linears)
        )


def stack_of(linears: Sequence[Any]) -> Stack | None:
    """Return the stack that holds the first of these linears, or None."""
    return stacks_by_address.get(linears[0].weight.untyped_storage().data_ptr())


class Product:
    """The linears of one input as one product, with the LoRAs of each adapted lane.

    adapter_by_lane: from a lane to the number of its adapter. The A of the lanes are rows of `weight`. If the stack is
    another decoder's, they are a weight of their own, `a`, which costs one launch more.
    """

    def __init__(self, modules: Sequence[nn.Module], adapter_by_lane: Mapping[int, int], movable: Movable) -> None:
        linears = [bare_linear(module) for module in modules]
        self.widths = [linear.weight.shape[0] for linear in linears]
        self.loras: list[tuple[int, int, Lora]] = [
            (adapter_by_lane[lane], part, module.loras[i])
            for part, module in enumerate(modules)
            if isinstance(module, LaneLinear)
            for lane, i in module.index.items()
        ]
        self.rank = max((len(lora.a) for _, _, lora in self.loras), default=0)
        out, first = sum(self.widths), linears[0].weight
        adapters = len(adapter_by_lane) if self.rank else 0
        rows = adapters * len(linears) * self.rank
        self.b = first.new_zeros(adapters, self.rank, out) if self.rank else None
        self.kernel_row_counts: frozenset[int] = frozenset()
        self.columns = list(torch.arange(out).split(self.widths))
        found = stack_of(linears)
        self.owns_stack = found is None
        self.stack = self._stacked(linears, rows, movable) if found is None else found
        self.a = self.stack.weight[out:] if self.owns_stack else first.new_zeros(rows, first.shape[1])
        size = len(self.stack.weight) if self.owns_stack else out
        self.weight = self.stack.weight[:size]
        self.bias = None if self.stack.bias is None else self.stack.bias[:size]
        for module in modules:
            # The linear held the weight at its old address.
            if isinstance(module, LaneLinear):
                module.run = SmallLinear(module.linear.weight, module.linear.bias, module.loras)
        self.reread()

    def _stacked(self, linears: Sequence[Any], rows: int, movable: Movable) -> Stack:
        """Move the linears' weights into one memory, with `rows` more rows for the A of the lanes."""
        first = linears[0].weight
        weight = first.new_zeros(sum(self.widths) + rows, first.shape[1])
        bias = None if all(linear.bias is None for linear in linears) else weight.new_zeros(len(weight))
        for linear, columns in zip(linears, self.columns):
            span = slice(int(columns[0]), int(columns[-1]) + 1)
            movable.move(linear.weight, weight[span])
            if bias is not None and linear.bias is not None:
                movable.move(linear.bias, bias[span])
        return Stack(weight, bias)

    def reread(self) -> None:
        for adapter, part, (a, b, scale) in self.loras:
            begin = (adapter * len(self.widths) + part) * self.rank
            self.a[begin : begin + len(a)] = a
            columns = self.columns[part]
            assert self.b is not None
            self.b[adapter, : len(a), int(columns[0]) : int(columns[-1]) + 1] = b * scale

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [..., in]. Return [..., out + rows of A]: the outputs, then the shrunk inputs of the adapters."""
        if len(self.a) and not self.owns_stack:
            return self._two_products(x)
        if serves(self, x):
            return few_rows_linear(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def _two_products(self, x: Tensor) -> Tensor:
        """Compute the same result by two products, of `weight` and of `a`, into one memory."""
        rows, out = x.reshape(-1, x.shape[-1]), len(self.weight)
        y = x.new_empty(len(rows), out + len(self.a))
        if self.bias is None:
            torch.mm(rows, self.weight.T, out=y[:, :out])
        else:
            torch.addmm(self.bias, rows, self.weight.T, out=y[:, :out])
        torch.mm(rows, self.a.T, out=y[:, out:])
        return y.view(*x.shape[:-1], -1)

    def lanes(self, adapters: Tensor | None) -> Lanes | None:
        return None if self.b is None or adapters is None else Lanes(self.b, adapters)


def bare_linear(module: Any) -> Any:
    """Return the linear without the lanes' adapters."""
    return module.linear if isinstance(module, LaneLinear) else module


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)
