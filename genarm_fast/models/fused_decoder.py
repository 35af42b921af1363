"""The decoder of Llama and its likes without what a module call costs, for CPUs.

A decode step of 30 layers calls some 370 modules, and each call asks for hooks, keywords and configuration: an eighth
of the time of SmolLM2-135M on one core. Here a layer's parts are called one after the other. Used only where every part
is exactly what this file knows, and where a trial gives the bits of the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from genarm_fast.kernels.linear import SiblingLinears, Span
from genarm_fast.kernels.quant_linear import QuantLinear
from genarm_fast.kernels.ragged_attention import ragged_attention
from genarm_fast.kernels.rotary import rotary
from genarm_fast.kernels.silu_mul import silu_mul
from genarm_fast.kernels.small_linear import SmallLinear
from genarm_fast.models.forward_context import Ragged, place, spans_of
from genarm_fast.models.known_decoders import WINDOWS, Output, built_as_known, family_of, trial
from genarm_fast.models.lora_lanes import LaneLinear

Fast = Mapping[nn.Module, Callable[..., Any]]  # what a runner put in place of forwards
Spans = Mapping[tuple[int, ...], Sequence[Span]]  # of the rows of a forward, for linears by the lanes they adapt


@torch.inference_mode()
def fused_forward(decoder: Any, fast: Fast) -> Callable[..., Output] | None:
    """The forward of a model without its head, over our cache; None where its own is needed."""
    if not (built_as_known(decoder, fast) and _runs_here(decoder, fast)):
        return None
    fused = _Decoder(decoder, fast, WINDOWS[family_of(decoder)])
    pairs = zip(*(trial(decoder, forward, [2]) for forward in (decoder, fused)))
    return fused if all(torch.equal(theirs, ours) for theirs, ours in pairs) else None


def _runs_here(decoder: Any, fast: Fast) -> bool:
    """Whether its weights are on the CPU, its rotation is `rotary`, and `silu_mul` stands between its linears."""
    on_cpu = all(parameter.is_cpu for parameter in decoder.parameters())
    return on_cpu and all(layer.self_attn in fast and layer.mlp in fast for layer in decoder.layers)


class _Decoder:
    def __init__(self, decoder: Any, fast: Fast, window: Callable[[Any], int | None]) -> None:
        self.embed, self.rotary, self.norm = decoder.embed_tokens, decoder.rotary_emb, _part(decoder.norm, fast)
        self.layers = [_Layer(layer, fast, window(layer.self_attn)) for layer in decoder.layers]
        adapted = [module.index for module in decoder.modules() if isinstance(module, LaneLinear)]
        self.adapted = {tuple(index): index for index in adapted}

    def __call__(self, input_ids: Tensor, position_ids: Tensor, past_key_values: Cache, **_: Any) -> Output:
        """input_ids, position_ids: int64 [N, q]."""
        hidden = self.embed(input_ids)
        cos, sin = self.rotary(hidden, position_ids=position_ids)
        where = place(hidden.device)
        spans = {lanes: spans_of(index, input_ids.shape[1]) for lanes, index in self.adapted.items()}
        for layer, cache in zip(self.layers, past_key_values.layers):
            hidden = layer(hidden, cos, sin, cache, where, spans)
        return Output(self.norm(hidden), past_key_values)


class _Layer:
    def __init__(self, layer: Any, fast: Fast, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.second_norm = _part(layer.input_layernorm, fast), _part(layer.post_attention_layernorm, fast)
        self.q_norm, self.k_norm = (
            _part(getattr(attention, name), fast) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )
        self.qkv = _siblings([attention.q_proj, attention.k_proj, attention.v_proj], fast)
        self.gate_up = _siblings([mlp.gate_proj, mlp.up_proj], fast)
        self.o, self.down = _linear(attention.o_proj, fast), _linear(mlp.down_proj, fast)
        self.width, self.scale, self.window = attention.head_dim, attention.scaling, window

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Any, where: Ragged, spans: Spans) -> Tensor:
        rows, block, _ = hidden.shape
        heads = (rows, block, -1, self.width)
        query, key, value = (state.view(heads) for state in self.qkv(self.norm(hidden), spans))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        keys, values = cache.update(key, value.transpose(1, 2))
        x = ragged_attention(
            query,
            keys,
            values,
            where.slots,
            where.positions,
            scale=self.scale,
            window=self.window,
            limit=where.kv_bound,
        )
        hidden = hidden + self.o(x.view(rows, block, -1), spans)
        gate, up = self.gate_up(self.second_norm(hidden), spans)
        hidden += self.down(silu_mul(gate, up), spans)
        return hidden


def _part(module: nn.Module, fast: Fast) -> Callable[..., Any]:
    return fast.get(module, module)


def _linear(module: nn.Module, fast: Fast) -> Callable[[Tensor, Spans], Tensor]:
    """A function that applies the linear to [N, q, in], with the lanes' adapters in the forward's spans."""
    if isinstance(module, LaneLinear):
        run, lanes = module.run, tuple(module.index)
        return lambda x, spans: run(x, spans[lanes])
    part = _part(module, fast)
    return lambda x, _: part(x)


def _siblings(modules: Sequence[nn.Module], fast: Fast) -> Callable[[Tensor, Spans], Iterable[Tensor]]:
    """A function that applies all these linears to one input [N, q, in]; in one C++ call where each allows it."""
    runs = [module.run if isinstance(module, LaneLinear) else _part(module, fast) for module in modules]
    lanes = [tuple(module.index) if isinstance(module, LaneLinear) else () for module in modules]
    if all(isinstance(run, (SmallLinear, QuantLinear)) for run in runs):
        siblings = SiblingLinears(runs)
        return lambda x, spans: siblings(x, [spans[own] if own else () for own in lanes])
    linears = [_linear(module, fast) for module in modules]
    return lambda x, spans: [linear(x, spans) for linear in linears]
