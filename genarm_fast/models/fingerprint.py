"""A short hash of a model's own weights, so that an adapter is never put on another base unnoticed."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor, nn

SAMPLES_PER_MATRIX = 16  # numbers taken from every matrix
SAMPLED_ROWS = 256  # first rows that the numbers come from; more tokens in the vocabulary then change nothing
# bf16 numbers of at least this size are exact in fp16 too; smaller numbers count as zero.
SMALLEST = 2.0**-14


def fingerprint(model: nn.Module) -> str | None:
    """Return 16 hex digits computed from values of every weight matrix.

    It takes 12 ms of CPU time for 211 matrices on a busy machine. The fingerprint is the same for a bfloat16 checkpoint
    loaded as bfloat16, float16 or float32, and for a float32 checkpoint loaded as float32 or bfloat16. LoRA layers or
    vocabulary rows that are added to a model do not change it. A change of the weights themselves (fine-tuning,
    merging) does.

    Returns:
        None if the weights cannot be read as numbers: on the meta device, or quantised by another library. Such a model
        can be neither confirmed nor refused. A model that our `quantization=` made has the fingerprint of the weights
        it was made from, as long as its codes and scales are unchanged.
    """
    if (quantized := getattr(model, "quantized", None)) is not None:  # see quantized.py
        now = codes_fingerprint(model)
        return quantized.fingerprint if now == quantized.codes_fingerprint else now
    weights = _own_weights(model)
    # Another library quantised the model. Its tensors may look like numbers, and hold something else.
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    if not weights or any(w.is_meta or not w.is_floating_point() or w.itemsize < 2 for w in weights.values()):
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape[1:])}".encode())
    samples = torch.cat([_sample(weights[name]).float().cpu() for name in sorted(weights)])
    digest.update(_rounded(samples).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def codes_fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits computed from codes and scales, for a model whose weights are held in 8 or 4 bits."""
    digest = hashlib.sha256()
    for name, weight in sorted(_own_weights(model).items()):
        digest.update(name.encode())
        linear = getattr(weight, "linear", None)
        samples = [_rounded(_sample(weight).float())] if linear is None else linear.sample(SAMPLES_PER_MATRIX)
        for sample in samples:
            digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices by the names that they have in the plain model, without those of adapters."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").split(".")
        if parameter.ndim < 2 or any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        weights[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = parameter
    return weights


def _sample(weight: Tensor) -> Tensor:
    """Return SAMPLES_PER_MATRIX numbers, evenly spaced over the first SAMPLED_ROWS rows."""
    rows = weight.detach()[:SAMPLED_ROWS].flatten()
    return rows[_sample_indices(rows.numel(), weight.device)]


@cache
def _sample_indices(numbers: int, device: torch.device) -> Tensor:
    return torch.arange(SAMPLES_PER_MATRIX, device=device) * (numbers - 1) // (SAMPLES_PER_MATRIX - 1)


def _rounded(values: Tensor) -> Tensor:
    """Round float32 to bfloat16, so that all dtypes of loading give the same numbers."""
    return values.where(values.abs() >= SMALLEST, 0.0).to(torch.bfloat16)
