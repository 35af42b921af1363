"""Convert codes, scales and zeros of GPTQ, AWQ and compressed-tensors checkpoints for quant_linear.

In all three methods w[o, i] = scale · (code - zero), by groups of inputs. quant_linear has groups of 32 inputs with a
float16 scale, and for 4 bits also a float16 minimum, -scale · zero. A matrix that quant_linear can hold exactly keeps
its codes; any other matrix is dequantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genarm_fast.kernels.quant_linear import QuantWeight, dequantize

GROUP = 32
# Output, out of eight, of each 4-bit field of a word, lowest field first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class CodedMatrix(NamedTuple):
    """A coded matrix of a checkpoint."""

    codes: Tensor  # int16 [out, in]
    zeros: Tensor  # int16 [out, groups]
    scales: Tensor  # floating point [out, groups]
    group: Tensor  # int64 [in], the group of each input

    def values(self) -> Tensor:
        """Return the weights that the codes stand for, float32 [out, in]; exact if the scales have 16 bits."""
        return (self.codes - self.zeros[:, self.group]).float() * self.scales.float()[:, self.group]

    def as_quant_weight(self) -> QuantWeight | None:
        """Return the same weight in 4 bits, else in 8 bits, or None if neither holds it exactly."""
        width = self.codes.shape[1]
        first = torch.arange(0, width, GROUP)
        if not torch.equal(self.group[first].repeat_interleave(GROUP)[:width], self.group):
            return None  # groups are smaller than 32 inputs, or scattered
        zeros, scales = (part[:, self.group[first]] for part in (self.zeros, self.scales))
        halves = scales.to(torch.float16)
        if not halves.isfinite().all() or not torch.equal(halves.to(scales.dtype), scales):
            return None
        lows = -(zeros.float() * halves.float())
        minimums = lows.to(torch.float16)
        codes = self.codes
        if int(codes.min()) >= 0 and int(codes.max()) <= 15 and torch.equal(minimums.float(), lows):
            return QuantWeight(codes.to(torch.uint8), halves, minimums)
        codes = codes - zeros.repeat_interleave(GROUP, 1)[:, :width]
        if int(codes.min()) < -128 or int(codes.max()) > 127:
            return None
        return QuantWeight(codes.to(torch.int8), halves)


def unpacked(words: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """Unpack int32 words, whose first code is in the lowest bits, into int16 codes, `count` of them along `dim`."""
    fields = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.movedim(dim, -1)[..., None] >> fields) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].movedim(-1, dim).to(torch.int16)


def check_bits(name: str, bits: Any) -> int:
    if bits not in (4, 8):
        raise ValueError(f"{name}={bits!r}: expected 4 or 8")
    return int(bits)


def _even_groups(width: int, groups: int, size: Any) -> Tensor:
    """Return the group of each input, for consecutive groups of `size` inputs; -1 or None: one group for all inputs."""
    size = width if size in (-1, None) else size
    if not isinstance(size, int) or size < 1 or groups != -(-width // size):
        raise ValueError(f"group_size={size!r}: expected that of {groups} groups over {width} inputs")
    return torch.arange(width) // size


def gptq(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedMatrix:
    """Read a matrix of GPTQ.

    qweight int32 [in · bits / 32, out], qzeros int32 [groups, out · bits / 32], scales [groups, out], optionally g_idx
    [in].
    """
    bits = check_bits("bits", config.get("bits"))
    groups, out = parts["scales"].shape
    width = parts["qweight"].shape[0] * (32 // bits)
    zeros = unpacked(parts["qzeros"], bits, 1, out)
    # Before version 2, the format stores each zero less one.
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    group = parts["g_idx"].long() if "g_idx" in parts else _even_groups(width, groups, config.get("group_size"))
    return CodedMatrix(unpacked(parts["qweight"], bits, 0, width).T, zeros.T, parts["scales"].T, group)


def awq(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedMatrix:
    """Read a matrix of AWQ. qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]."""
    version = str(config.get("version", "gemm")).lower()
    bits = config.get("bits", config.get("w_bit"))
    if version != "gemm" or bits != 4:
        raise ValueError(f"version={version!r}, bits={bits!r}: expected 'gemm' and 4")
    groups, out = parts["scales"].shape
    width = len(parts["qweight"])
    field_order = torch.tensor([AWQ_ORDER.index(i) for i in range(8)])

    def ordered(words: Tensor) -> Tensor:
        return unpacked(words, 4, 1, out).unflatten(1, (-1, 8))[..., field_order].flatten(1)

    group = _even_groups(width, groups, config.get("group_size", config.get("q_group_size")))
    return CodedMatrix(ordered(parts["qweight"]).T, ordered(parts["qzeros"]).T, parts["scales"].T, group)


def compressed_tensors(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedMatrix:
    """Read a matrix of compressed-tensors.

    weight_packed int32 [out, in · bits / 32] with codes plus 2^(bits - 1), or weight int8 [out, in]. weight_scale [out,
    groups], weight_shape [2]. weight_zero_point, optional, is packed along outputs like the codes, or int8.
    """
    weights = config["weights"]
    bits = check_bits("num_bits", weights.get("num_bits"))
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel", "tensor"):
        raise ValueError(
            f"type={weights.get('type')!r}, strategy={weights.get('strategy')!r}: "
            "expected 'int', and 'group', 'channel' or 'tensor'"
        )
    offset = 1 << (bits - 1)
    if "weight_packed" in parts:
        out, width = (int(size) for size in parts["weight_shape"])
        codes = unpacked(parts["weight_packed"], bits, 1, width)
    else:
        out, width = parts["weight"].shape
        codes = parts["weight"].to(torch.int16) + offset
    scales = parts["weight_scale"].reshape(-1, parts["weight_scale"].shape[-1] if parts["weight_scale"].ndim else 1)
    scales = scales.expand(out, -1)
    zeros = torch.full(scales.shape, offset, dtype=torch.int16)
    if (stored := parts.get("weight_zero_point")) is not None:
        if stored.dtype == torch.int32:
            zeros = unpacked(stored, bits, 0, out)
        else:
            zeros = (stored.to(torch.int16) + offset).reshape(-1, scales.shape[1]).expand(out, -1)
    size = weights.get("group_size") if weights["strategy"] == "group" else -1
    group = parts["weight_g_idx"].long() if "weight_g_idx" in parts else _even_groups(width, scales.shape[1], size)
    return CodedMatrix(codes, zeros, scales, group)


def as_bfloat16(matrix: CodedMatrix, quant_weight: QuantWeight | None) -> Tensor:
    """Return the matrix as a model without codes has it, bfloat16 [out, in]."""
    return (matrix.values() if quant_weight is None else dequantize(quant_weight)).to(torch.bfloat16)
