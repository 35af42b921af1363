"""Compute how much memory of each GPU the base, ARMs and caches take, before anything is bought or started.

Only the configurations are read: a folder with a config.json is enough. vLLM measures activations and CUDA graphs
itself; `reserve` stands for them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from genarm_fast.models.arm import ARM, arm_names
from genarm_fast.models.files import read_object, weight_bytes

GIB = 1 << 30


@dataclass(frozen=True)
class Share:
    """The memory that a member takes on one GPU: bytes of weights, and bytes of cache for each token."""

    name: str
    weights: float
    cache: float
    lane: bool = False


@dataclass(frozen=True)
class Plan:
    """The memory of one GPU out of `tensor_parallel` x `pipeline_parallel`, in bytes.

    tokens: number of tokens that the caches hold, of all requests together.
    """

    shares: tuple[Share, ...]
    memory: float
    reserve: float
    tensor_parallel: int
    pipeline_parallel: int

    @property
    def weights(self) -> float:
        return sum(share.weights for share in self.shares)

    @property
    def cache_per_token(self) -> float:
        return sum(share.cache for share in self.shares)

    @property
    def tokens(self) -> int:
        return max(0, int((self.memory - self.reserve - self.weights) / self.cache_per_token))

    def table(self, length: int) -> str:
        """Return the plan as text. length: tokens of a request, prompt and response together."""
        gpus = self.tensor_parallel * self.pipeline_parallel
        lines = [
            f"a GPU of {gpus} (tensor parallel {self.tensor_parallel}, pipeline parallel {self.pipeline_parallel})",
            f"{'member':<28}{'weights, GiB':>14}{'cache, bytes/token':>20}",
        ]
        for share in self.shares:
            name = share.name + (" (lane)" if share.lane else "")
            lines.append(f"{name:<28}{share.weights / GIB:>14.2f}{share.cache:>20,.0f}")
        lines.append(f"{'all':<28}{self.weights / GIB:>14.2f}{self.cache_per_token:>20,.0f}")
        left = self.memory - self.reserve - self.weights
        lines.append(
            f"memory for use {self.memory / GIB:.1f} GiB, of which {self.reserve / GIB:.1f} for activations and graphs;"
            f" left for caches {left / GIB:.1f} GiB"
        )
        if left <= 0:
            lines.append(
                "the weights do not fit: more GPUs, or a quantised base (--quantization fp8, an AWQ checkpoint)"
            )
        else:
            lines.append(f"{self.tokens:,} tokens: {self.tokens // length:,} requests of {length:,} tokens at once")
        return "\n".join(lines)


def plan(
    base: str | os.PathLike[str],
    arms: Sequence[ARM],
    *,
    gpu_memory: float = 80 * 1e9,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    utilization: float = 0.92,
    cache_bytes: int = 2,
    reserve: float = 4 * GIB,
) -> Plan:
    """Return what each GPU holds.

    Args:
        base, arms: folders or hub ids, whose configurations are read; adapters are lanes of the base.
        gpu_memory: bytes of a GPU.
        utilization: the share of a GPU's memory that vLLM may take.
        cache_bytes: bytes of a number in the caches: 2 for bf16, 1 for FP8.
        reserve: bytes for activations and CUDA graphs.

    Raises:
        ValueError: a number of heads that the number of GPUs does not divide, or a number out of its range.
    """
    for name, value in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected a number of GPUs >= 1")
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization}: expected a number in (0, 1]")
    parts = {"tp": tensor_parallel, "pp": pipeline_parallel, "width": cache_bytes}
    config = _config(os.fspath(base))
    first = _share("base", os.fspath(base), config, **parts)
    shares = [first]
    for name, arm in zip(arm_names(arms), arms):
        source = os.fspath(arm.model)  # type: ignore[arg-type]
        adapter = read_object(name, source, "adapter_config.json")
        if adapter:
            weights = _adapter_bytes(source, adapter, config) / (tensor_parallel * pipeline_parallel)
            shares.append(Share(name, weights, first.cache, lane=True))
        else:
            shares.append(_share(name, source, _config(source), **parts))
    memory = gpu_memory * utilization
    return Plan(tuple(shares), memory, reserve, tensor_parallel, pipeline_parallel)


def _config(source: str) -> Any:
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _share(name: str, source: str, config: Any, *, tp: int, pp: int, width: int) -> Share:
    text = config.get_text_config()
    heads = text.num_attention_heads
    if heads % tp:
        raise ValueError(f"tensor_parallel={tp}: expected a divisor of {heads}, the heads of {name}")
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    own = max(1, kv_heads // tp)  # heads on one GPU; fewer heads than GPUs are copied
    layers = -(-text.num_hidden_layers // pp)
    return Share(name, _bytes(source, config) / (tp * pp), 2 * layers * own * head_dim * width)


def _bytes(source: str, config: Any) -> float:
    """Return the bytes of all weights: of the weight files if they are here, else counted from the configuration."""
    if os.path.isdir(source) and (found := weight_bytes(Path(source))):
        return found
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_unquantised(config))
    tables = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    kept = sum(p.numel() for m in model.modules() if id(m) in tables for p in m.parameters(recurse=False))
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = min(kept, total)
    width = getattr(config, "dtype", None) or torch.bfloat16
    return kept * width.itemsize + (total - kept) * _bits(config, 8 * width.itemsize) / 8


def _unquantised(config: Any) -> Any:
    copied = type(config).from_dict(config.to_dict())
    if hasattr(copied, "quantization_config"):
        del copied.quantization_config
    return copied


def _bits(config: Any, otherwise: int) -> float:
    """Return the bits of a weight in a linear. Quantisation in groups of 128 adds a scale of 16 bits to each group."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return otherwise
    get = found.get if isinstance(found, dict) else lambda name: getattr(found, name, None)
    bits = get("bits") or get("w_bit")
    return bits + 16 / (get("group_size") or 128) if bits else 8


def _adapter_bytes(source: str, adapter: dict[str, Any], config: Any) -> float:
    if os.path.isdir(source) and (found := weight_bytes(Path(source))):
        return found
    text = config.get_text_config()
    targets = adapter.get("target_modules") or []
    return 4.0 * adapter.get("r", 16) * text.hidden_size * text.num_hidden_layers * len(targets)
