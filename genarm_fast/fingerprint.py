"""A short hash of a model's own weights, so that an adapter is never put on another base unnoticed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

PARAMETERS = 16
VALUES = 64
ROWS = 1024
# bf16 numbers from here on are exact in fp16 too; smaller ones count as zero.
SMALLEST = 2.0**-14


def fingerprint(model: nn.Module) -> str | None:
    """Hash of values sampled from the weights: 16 hex digits, in milliseconds.

    The same for a bfloat16 checkpoint loaded as bfloat16, float16 or float32, for a float32 one loaded as float32 or
    bfloat16, and for a model before and after LoRA layers or vocabulary rows are added to it. Different once the
    weights themselves change (fine-tuned, merged).

    Returns:
        None where the weights cannot be read as numbers: on the meta device, or quantised. The model can then be
        neither confirmed nor refused.
    """
    weights = _own_weights(model)
    digest = hashlib.sha256()
    names = sorted(weights)
    # Evenly over all layers: a merged LoRA leaves embeddings and norms as they were.
    for i in range(min(PARAMETERS, len(names))):
        name = names[i * (len(names) - 1) // max(1, min(PARAMETERS, len(names)) - 1)]
        weight = weights[name]
        if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return None
        digest.update(f"{name}:{tuple(weight.shape[1:])}".encode())
        digest.update(_sample(weight).numpy().tobytes())
    return digest.hexdigest()[:16] if names else None


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Matrices by the name they have in the plain model, adapters left out."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        if parameter.ndim >= 2 or parameter.is_meta:
            weights[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = parameter
    return weights


def _sample(weight: Tensor) -> Tensor:
    """VALUES numbers from the first ROWS rows, as bfloat16 bits."""
    rows = weight.detach()[:ROWS]
    index = torch.arange(VALUES, device=weight.device) * (rows.numel() - 1) // (VALUES - 1)
    picked = rows.reshape(-1)[index] if rows.is_contiguous() else rows.flatten()[index]
    values = picked.to("cpu", torch.float32)
    return values.where(values.abs() >= SMALLEST, 0.0).to(torch.bfloat16).view(torch.int16)
