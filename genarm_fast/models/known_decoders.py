"""Which decoders this package can run by a forward of its own, and the trial against the model's own forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from genarm_fast.kernels import Lanes
from genarm_fast.kernels.add_rms_norm import add_rms_norm
from genarm_fast.kernels.rms_norm import rms_norm
from genarm_fast.models.forward_context import Ragged, at_positions, running
from genarm_fast.models.kv_cache import RaggedLayer
from genarm_fast.models.lora_lanes import LaneLinear

WINDOWS: dict[str, Callable[[Any], int | None]] = {  # the window that the attention of a family passes on
    "Llama": lambda attention: None,
    "Mistral": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2": lambda attention: attention.sliding_window,
    "Qwen3": lambda attention: attention.sliding_window,
}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm as `rms_norm` computes it, which documents the offset."""

    weight: Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset)

    def of_sum(self, hidden: Tensor, y: Tensor, lanes: Lanes | None = None) -> tuple[Tensor, Tensor]:
        """Return hidden + y, with what the lanes add to y, and the norm of that sum."""
        return add_rms_norm(hidden, y, self.weight, self.eps, offset=self.offset, lanes=lanes)


class Output(NamedTuple):
    """The fields that heads read of transformers' output object, which takes 80 µs to make."""

    last_hidden_state: Tensor
    past_key_values: Cache
    hidden_states: None = None
    attentions: None = None


def family_of(decoder: Any) -> str:
    """Return the name of the decoder's family, which is a key of `WINDOWS` for a known one."""
    return type(decoder).__name__.removesuffix("Model")


def built_as_known(decoder: Any, replaced: Collection[nn.Module] = ()) -> bool:
    """Whether a decoder is built of the classes of its family's file, and nothing hooks or replaces their calls.

    replaced: modules whose forwards we replaced ourselves.
    """
    family = family_of(decoder)
    file = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    if family not in WINDOWS or type(decoder).__module__ != file:
        return False
    for module in decoder.modules():
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hooks or ("forward" in vars(module) and module not in replaced):
            return False
    classes = vars(sys.modules[file])
    parts = {"": "DecoderLayer", "self_attn": "Attention", "mlp": "MLP"}
    return all(
        type(layer.get_submodule(path)) is classes[family + name]
        for layer in decoder.layers
        for path, name in parts.items()
    )


def head_of(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the function from hidden states to logits, for a causal LM whose decoder's forward we replaced.

    None if the LM's forward has to be called, because what it does besides is unknown. In the families of `WINDOWS` the
    LM's forward applies only `lm_head`; the rest of that forward takes 0.1 ms with cold caches (by hand, 2026-11-29).
    """
    decoder, kind = model.base_model, type(model)
    known = kind.__name__ == f"{family_of(decoder)}ForCausalLM" and kind.__module__ == type(decoder).__module__
    if not known or "forward" not in vars(decoder) or "forward" in vars(model):
        return None
    return None if model._forward_hooks or model._forward_pre_hooks else model.lm_head


def lanes_of(decoder: nn.Module) -> list[int]:
    """Return the sorted lanes that have an adapter in the decoder."""
    return sorted({lane for module in decoder.modules() if isinstance(module, LaneLinear) for lane in module.index})


def over_layers(forward: Callable[..., Output], kept: Sequence[int]) -> Callable[..., Output]:
    """Return a forward of the layers `kept` that passes each layer its own part of the whole decoder's cache."""

    def of_these(past_key_values: Cache, **given: Any) -> Output:
        return forward(past_key_values=Cache(layers=[past_key_values.layers[i] for i in kept]), **given)

    return of_these


@torch.inference_mode()
def trial(decoder: Any, forward: Callable[..., Any], blocks: Sequence[int]) -> list[Tensor]:
    """Run a forward on a short text in each lane, block after block. Return hidden states, then keys and values.

    blocks: the number of tokens of each forward. The first dimension of each tensor counts the lanes, lane 0 before the
    lanes that have an adapter.
    """
    lanes = [0, *(lane for lane in lanes_of(decoder) if lane)]
    layers = [RaggedLayer(len(lanes), sum(blocks)) for _ in decoder.layers]
    cache, device, found = Cache(layers=list(layers)), decoder.embed_tokens.weight.device, []
    rows = torch.arange(len(lanes), device=device)
    for start, block in zip((sum(blocks[:i]) for i in range(len(blocks))), blocks):
        positions = torch.arange(start, start + block, device=device).expand(len(lanes), block)
        tokens = (31 * positions + 7 * rows[:, None]) % decoder.config.vocab_size
        with running(lanes, 1), at_positions(Ragged(rows, positions, start + block)):
            out = forward(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        found.append(out.last_hidden_state)
    return [*found, *(states for layer in layers for states in (layer.keys, layer.values) if states is not None)]
