"""All layers of a fused decoder in one call of the C++ core, with the bits of the core's single ops.

Otherwise a step of SmolLM2-135M with one row makes 270 calls of ops from Python. In 4 bits, these calls take a sixth
of the step's time (by hand, AMD EPYC with AVX-512, 2026-11-29).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genarm_fast.kernels import _native
from genarm_fast.kernels.linear import Span
from genarm_fast.models.forward_context import Ragged
from genarm_fast.models.known_decoders import Norm

Lanes = tuple[int, ...]  # indices of the LoRA lanes that adapt a linear


class OneCall:
    """The layers of a fused decoder, described to the core once, and run by one call.

    layers: the layers of `fused_decoder`. They must outlive this object.
    next_norms: the norm that follows each layer.
    lanes: each set of lanes that adapts any linear, and the empty set.
    """

    def __init__(self, layers: Sequence[Any], next_norms: Sequence[Norm], lanes: Sequence[Lanes]) -> None:
        self._lanes, self._core = list(lanes), None
        if _native.core is not None and layers:
            described = [self._described(layer, norm) for layer, norm in zip(layers, next_norms)]
            if None not in described:
                self._core = _native.core.decoder_layers(tuple(described))

    def _described(self, layer: Any, next_norm: Norm) -> tuple[Any, ...] | None:
        """Return a layer in the form that the core takes; None if code outside the core runs one of its linears."""
        linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
        cores = [None if each.siblings is None else each.siblings.prepared for each in linears]
        if None in cores:
            return None
        lanes = tuple(self._lanes.index(own) for each in linears for own in each.lanes)
        norms = [value for norm in (layer.second_norm, next_norm) for value in (norm.weight, norm.eps, norm.offset)]
        heads = [layer.head_norms.get(name) for name in ("query_norm", "key_norm")]
        eps = layer.head_norms.get("eps", 0.0)
        return (*cores, lanes, *norms, *heads, eps, layer.width, layer.scale, layer.window)

    def __call__(
        self,
        hidden: Tensor,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: Sequence[Any],
        where: Ragged,
        spans: Mapping[Lanes, Sequence[Span]],
    ) -> Tensor | None:
        """Return the output of the last norm, [N, q, width], and append to the caches.

        Return None, with nothing written, for a call that the core can't take.

        hidden: the residual stream [N, q, width].
        x: the norm of `hidden`, the first layer's input.
        angles: cos and sin of the rotary embedding.
        caches: the KV cache of each layer.
        where: slot of each row, and positions of its tokens.
        spans: for each set of lanes, the spans of the LoRAs.
        """
        if self._core is None or _native.core is None or torch.is_grad_enabled():
            return None
        states = tuple(states for cache in caches for states in (cache.keys, cache.values))
        of_lanes = tuple(spans[lanes] for lanes in self._lanes)
        return self._core.run(hidden, x, *angles, where.slots, where.positions, of_lanes, states)
