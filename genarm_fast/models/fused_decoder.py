"""The decoder of Llama and similar models without the cost of module calls, for CPUs.

A decode step of 30 layers calls some 370 modules, and each call looks up hooks, keywords and configuration. These
lookups take an eighth of the time of SmolLM2-135M on one core. Here one call of the C++ core runs all layers
(`one_call`), with the bits of the model's own forward. If the core does not take the layers, each layer makes nine
calls of ops. The fused decoder is used only if this file knows every part exactly, and a trial gives the bits of
that forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from genarm_fast.device.base import out_of_memory
from genarm_fast.kernels.linear import SiblingLinears, Span
from genarm_fast.kernels.quant_linear import QuantLinear
from genarm_fast.kernels.ragged_attention import ragged_attention
from genarm_fast.kernels.rotary_append import rotary_append
from genarm_fast.kernels.silu_mul import silu_mul
from genarm_fast.kernels.small_linear import SmallLinear
from genarm_fast.models.angles import Angles
from genarm_fast.models.forward_context import Ragged, current_positions, spans_of
from genarm_fast.models.known_decoders import WINDOWS, Norm, Output, built_as_known, family_of, over_layers, trial
from genarm_fast.models.kv_cache import Entry
from genarm_fast.models.lora_lanes import LaneLinear
from genarm_fast.models.one_call import OneCall

# Modules, each with the function that a runner put in place of its forward.
Fast = Mapping[nn.Module, Callable[..., Any]]
# The spans of a forward's rows for each set of LoRA lanes that adapts a linear.
Spans = Mapping[tuple[int, ...], Sequence[Span]]


@torch.inference_mode()
def fused_forward(decoder: Any, fast: Fast) -> Callable[..., Output] | None:
    """Return a fused forward of a decoder (a model without its head) over our KV cache; None if it can't run fused."""
    if not (built_as_known(decoder, fast) and _runs_here(decoder, fast)):
        return None
    try:
        expected = trial(decoder, decoder, [2])
    # The model does not run at all. The self-check reports which model fails, and why.
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise
        return None
    fused = FusedDecoder(decoder, fast, WINDOWS[family_of(decoder)])
    return fused if all(torch.equal(*pair) for pair in zip(expected, trial(decoder, fused, [2]))) else None


def _runs_here(decoder: Any, fast: Fast) -> bool:
    """Whether all weights are on the CPU, and fast functions replaced every attention, MLP and norm of the decoder."""
    on_cpu = all(parameter.is_cpu for parameter in decoder.parameters())
    norms = [decoder.norm, *(norm for layer in decoder.layers for norm in _norms_of(layer))]
    known = all(layer.self_attn in fast and layer.mlp in fast for layer in decoder.layers)
    return on_cpu and known and all(isinstance(fast.get(norm), Norm) for norm in norms)


class FusedDecoder:
    """The forward of a decoder (a model without its head) over our cache. It takes the place of `decoder.forward`."""

    def __init__(self, decoder: Any, fast: Fast, window: Callable[[Any], int | None]) -> None:
        self.embed, self.angles = _part(decoder.embed_tokens, fast), Angles(decoder.rotary_emb)
        self.layers = [_FusedLayer(layer, fast, window(layer.self_attn)) for layer in decoder.layers]
        self.norm, *norms = (_norm(layer.input_layernorm, fast) for layer in decoder.layers)
        self.next_norms = [*norms, _norm(decoder.norm, fast)]
        adapted = [module.index for module in decoder.modules() if isinstance(module, LaneLinear)]
        self.adapted = {tuple(index): index for index in adapted}
        self.one_call = OneCall(self.layers, self.next_norms, [(), *self.adapted])

    def __call__(self, input_ids: Tensor, position_ids: Tensor, past_key_values: Cache, **_: Any) -> Output:
        """Run the decoder. input_ids, position_ids: int64 [N, q]."""
        hidden = self.embed(input_ids)
        where = current_positions(hidden.device)
        angles = self.angles(hidden, position_ids, where.kv_bound)
        spans: dict[tuple[int, ...], Sequence[Span]] = {(): ()}
        spans |= {lanes: spans_of(index, input_ids.shape[1]) for lanes, index in self.adapted.items()}
        caches: Sequence[Any] = past_key_values.layers
        for layer, cache in zip(self.layers, caches):
            layer.prepare(cache, hidden)
        x = self.norm(hidden)
        out = self.one_call(hidden, x, angles, caches, where, spans)
        if out is None:
            for layer, next_norm, cache in zip(self.layers, self.next_norms, caches):
                hidden, x = layer(hidden, x, angles, cache, where, spans, next_norm)
            out = x
        return Output(out, past_key_values)

    def of_layers(self, kept: Sequence[int]) -> Callable[..., Output]:
        """Return a forward that runs only the layers `kept`, over the same cache."""
        part, norms = copy.copy(self), [self.norm, *self.next_norms]
        part.layers, part.norm = [self.layers[i] for i in kept], norms[kept[0]]
        part.next_norms = [*(norms[i] for i in kept[1:]), norms[-1]]
        part.one_call = OneCall(part.layers, part.next_norms, [(), *self.adapted])
        return over_layers(part, kept)


class _FusedLayer:
    """A decoder layer as calls of ops, for forwards that `OneCall` can't run."""

    def __init__(self, layer: Any, fast: Fast, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.second_norm = _norm(layer.post_attention_layernorm, fast)
        self.head_norms: dict[str, Any] = {}
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, fast), _norm(attention.k_norm, fast)
            self.head_norms = {"query_norm": query.weight, "key_norm": key.weight, "eps": query.eps}
        self.qkv = _Linears([attention.q_proj, attention.k_proj, attention.v_proj], fast)
        self.gate_up = _Linears([mlp.gate_proj, mlp.up_proj], fast)
        self.o, self.down = _Linears([attention.o_proj], fast), _Linears([mlp.down_proj], fast)
        self.width, self.scale, self.window = attention.head_dim, attention.scaling, window
        self.kv_heads = attention.config.num_key_value_heads

    def prepare(self, cache: Any, hidden: Tensor) -> None:
        """Allocate this layer's cache, if it has no memory yet."""
        if not cache.is_initialized:
            cache.allocate(Entry(self.kv_heads, (self.width, self.width), hidden.dtype, hidden.device))

    def __call__(
        self,
        hidden: Tensor,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: Any,
        where: Ragged,
        spans: Spans,
        next_norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after this layer, and the next layer's input."""
        keys, values, slots, positions = cache.keys, cache.values, where.slots, where.positions
        query = rotary_append(self.qkv.stacked(x, spans), *angles, keys, values, slots, positions, **self.head_norms)
        y = ragged_attention(
            query.transpose(1, 2), keys, values, slots, positions,
            scale=self.scale, window=self.window, limit=where.kv_bound,
        )  # fmt: skip
        hidden, x = self.second_norm.of_sum(hidden, self.o(y.flatten(2), spans)[0])
        gate, up = self.gate_up(x, spans)
        return next_norm.of_sum(hidden, self.down(silu_mul(gate, up), spans)[0])


def _part(module: nn.Module, fast: Fast) -> Callable[..., Any]:
    return fast.get(module, module)


def _norms_of(layer: Any) -> list[nn.Module]:
    names = [name for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)]
    heads = [getattr(layer.self_attn, name) for name in names]
    return [layer.input_layernorm, layer.post_attention_layernorm, *heads]


def _norm(module: nn.Module, fast: Fast) -> Norm:
    norm = fast[module]
    assert isinstance(norm, Norm)
    return norm


class _Linears:
    """Linears over one input [N, q, in]. The LoRA of each lane adapts the rows of the lane's spans."""

    def __init__(self, modules: Sequence[nn.Module], fast: Fast) -> None:
        self.lanes = [tuple(module.index) if isinstance(module, LaneLinear) else () for module in modules]
        self.runs = [module.run if isinstance(module, LaneLinear) else _part(module, fast) for module in modules]
        ours = all(isinstance(run, (SmallLinear, QuantLinear)) for run in self.runs)
        self.siblings = SiblingLinears(self.runs) if ours else None

    def __call__(self, x: Tensor, spans: Spans) -> Sequence[Tensor]:
        """Return the output of each linear, [N, q, out]."""
        if self.siblings is not None:
            return self.siblings(x, [spans[own] for own in self.lanes])
        return [run(x, spans[own]) if own else run(x) for run, own in zip(self.runs, self.lanes)]

    def stacked(self, x: Tensor, spans: Spans) -> Tensor:
        """Return the outputs side by side: [N, q, sum of outputs]."""
        if self.siblings is not None:
            return self.siblings.stacked(x, [spans[own] for own in self.lanes])
        return torch.cat(list(self(x, spans)), -1)
