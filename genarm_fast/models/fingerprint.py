"""A short hash of a model's own weights, so that an adapter is never put on another base unnoticed."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor, nn

VALUES = 16  # of every matrix
ROWS = 256  # from its first rows alone: a vocabulary may grow
# bf16 numbers from here on are exact in fp16 too; smaller ones count as zero.
SMALLEST = 2.0**-14


def fingerprint(model: nn.Module) -> str | None:
    """16 hex digits from values of every weight matrix; 12 ms of CPU for 211 of them on a busy machine.

    The same for a bfloat16 checkpoint loaded as bfloat16, float16 or float32, for a float32 one loaded as float32 or
    bfloat16, and for a model before and after LoRA layers or vocabulary rows are added to it. Different once the
    weights themselves change (fine-tuned, merged).

    Returns:
        None where the weights cannot be read as numbers: on the meta device, or quantised by others. Such a model can
        be neither confirmed nor refused. One that our `quantization=` made has that of the weights it was made from, as
        long as its codes and scales are those that it got.
    """
    if (quantized := getattr(model, "quantized", None)) is not None:  # see quantized.py
        now = held_fingerprint(model)
        return quantized.fingerprint if now == quantized.held else now
    weights = _own_weights(model)
    if getattr(model, "hf_quantizer", None) is not None:  # its tensors may pass for numbers, and be others
        return None
    if not weights or any(w.is_meta or not w.is_floating_point() or w.itemsize < 2 for w in weights.values()):
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape[1:])}".encode())
    samples = torch.cat([_sample(weights[name]).float().cpu() for name in sorted(weights)])
    digest.update(_rounded(samples).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def held_fingerprint(model: nn.Module) -> str:
    """The same of codes and scales, where weights are held in 8 or 4 bits."""
    digest = hashlib.sha256()
    for name, weight in sorted(_own_weights(model).items()):
        digest.update(name.encode())
        linear = getattr(weight, "linear", None)
        samples = [_rounded(_sample(weight).float())] if linear is None else linear.sample(VALUES)
        for sample in samples:
            digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Matrices by the name they have in the plain model, adapters left out."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").split(".")
        if parameter.ndim < 2 or any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        weights[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = parameter
    return weights


def _sample(weight: Tensor) -> Tensor:
    """VALUES numbers, evenly from the first ROWS rows."""
    rows = weight.detach()[:ROWS].flatten()
    return rows[_places(rows.numel(), weight.device)]


@cache
def _places(numbers: int, device: torch.device) -> Tensor:
    return torch.arange(VALUES, device=device) * (numbers - 1) // (VALUES - 1)


def _rounded(values: Tensor) -> Tensor:
    """float32 → bfloat16, as all dtypes of loading give them."""
    return values.where(values.abs() >= SMALLEST, 0.0).to(torch.bfloat16)
