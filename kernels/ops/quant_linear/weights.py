"""Weights of 8 and 4 bits: what they stand for, and how the C++ core has them in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32  # inputs that share a scale
TILE = 32  # outputs whose codes lie together
# Where the inputs of a dword of codes are: word 0 of 16 bits has the first of each pair that is multiplied at once.
ORDER = {8: (0, 2, 1, 3), 4: (0, 2, 4, 6, 1, 3, 5, 7)}
BOUNDS = {8: (-128, 127), 4: (0, 15)}


class QuantWeight(NamedTuple):
    """w[o, i] = scales[o, i // 32] · codes[o, i] + minimums[o, i // 32]; the last group of an output may be short.

    8 bits: codes int8, -128..127, no minimums. 4 bits: codes uint8, 0..15, with minimums.
    """

    codes: Tensor  # [out, in]
    scales: Tensor  # float16 [out, groups]
    minimums: Tensor | None = None  # float16 [out, groups]

    @property
    def bits(self) -> int:
        return 8 if self.minimums is None else 4


def groups_of(width: int) -> int:
    return -(-width // GROUP)


def group_bytes(bits: int) -> int:
    """Of a tile: codes, float16 scales, and of 4 bits float16 minimums."""
    return TILE * (GROUP * bits // 8 + (2 if bits == 8 else 4))


def check_weight(weight: QuantWeight) -> None:
    """Raises TypeError or ValueError for tensors that are no weight of 8 or 4 bits, naming the part."""
    if not isinstance(weight, QuantWeight):
        raise TypeError(f"weight of {type(weight).__name__}: expected a QuantWeight")
    codes, scales, minimums = weight
    dtype = torch.int8 if weight.bits == 8 else torch.uint8
    if not isinstance(codes, Tensor) or codes.ndim != 2 or codes.dtype != dtype:
        found = f"{tuple(codes.shape)}, {codes.dtype}" if isinstance(codes, Tensor) else repr(codes)
        raise ValueError(f"weight.codes: {found}: expected {dtype} [out, in] of {weight.bits} bits")
    low, high = BOUNDS[weight.bits]
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"weight.codes from {int(codes.min())} to {int(codes.max())}: expected {low} to {high}")
    shape = (len(codes), groups_of(codes.shape[1]))
    for name, tensor in (("scales", scales), ("minimums", minimums)):
        if tensor is None and name == "minimums":
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != torch.float16:
            found = f"{tuple(tensor.shape)}, {tensor.dtype}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(
                f"weight.{name}: {found}: expected float16 {shape}, one for each {GROUP} inputs of an output"
            )
        if tensor.device != codes.device:
            raise ValueError(f"weight.{name} on {tensor.device}: expected {codes.device}, as the codes")
        if not tensor.isfinite().all():
            raise ValueError(f"weight.{name}: {int((~tensor.isfinite()).sum())} are NaN or infinite: expected numbers")


def in_groups(tensor: Tensor, width: int) -> Tensor:
    """[..., width] → [..., groups, 32], filled up with zeros."""
    padded = functional.pad(tensor, (0, groups_of(width) * GROUP - width))
    return padded.unflatten(-1, (groups_of(width), GROUP))


def dequantize(weight: QuantWeight) -> Tensor:
    """float32 [out, in]: scale · code + minimum, rounded once where 24 bits do not hold it."""
    width = weight.codes.shape[1]
    values = in_groups(weight.codes, width).float().mul_(weight.scales.float()[..., None])  # exact: 19 bits
    if weight.minimums is not None:
        values += weight.minimums.float()[..., None]
    return values.flatten(-2)[:, :width]


def pack(weight: QuantWeight) -> Tensor:
    """uint8 [tiles, groups, group_bytes]: dwords of 32 outputs side by side, in the order of the inputs.

    Codes of 8 bits are there plus 128, which unpacks faster.
    """
    codes, scales, minimums = weight
    out, width = codes.shape
    tiles, groups, bits = -(-out // TILE), groups_of(width), weight.bits
    rows = (0, 0, 0, 0, 0, tiles * TILE - out)
    each = len(ORDER[bits])
    dwords = functional.pad(in_groups(codes, width).view(torch.uint8), rows)
    dwords = dwords.view(tiles, TILE, groups, GROUP // each, each)[..., ORDER[bits]]
    dwords = dwords ^ 128 if bits == 8 else dwords[..., 0::2] | dwords[..., 1::2] << 4
    parts = [dwords.permute(0, 2, 3, 1, 4).reshape(tiles, groups, TILE * GROUP * bits // 8)]
    for halves in (scales, minimums):
        if halves is not None:
            padded = functional.pad(halves, (0, 0, 0, tiles * TILE - out)).view(tiles, TILE, groups)
            parts.append(padded.transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat(parts, -1)


def unpack(packed: Tensor, out: int, width: int, bits: int) -> QuantWeight:
    """The weight that `pack` packed."""
    return _unpack_tiles(packed, bits, lambda part: part.flatten(0, 1)[:out], width)


def unpack_rows(packed: Tensor, rows: Tensor, width: int, bits: int) -> QuantWeight:
    """Outputs `rows`, int64 [n], of a packed weight."""
    places = torch.arange(len(rows), device=packed.device), rows % TILE
    return _unpack_tiles(packed[rows // TILE], bits, lambda part: part[places], width)


def _unpack_tiles(packed: Tensor, bits: int, pick, width: int) -> QuantWeight:
    """pick: what is wanted of [tiles, TILE, ...]."""
    tiles, groups = packed.shape[:2]
    size, each = GROUP * bits // 8 * TILE, len(ORDER[bits])
    dwords = packed[..., :size].view(tiles, groups, GROUP // each, TILE, 4).permute(0, 3, 1, 2, 4)
    dwords = pick(dwords)
    if bits == 4:
        dwords = torch.stack((dwords & 15, dwords >> 4), -1).flatten(-2)
    places = [ORDER[bits].index(i) for i in range(each)]
    codes = dwords[..., places].flatten(1)[:, :width].contiguous()
    halves = packed[..., size:].contiguous().view(torch.float16).view(tiles, groups, 1 if bits == 8 else 2, TILE)
    scales, *minimums = (pick(halves[:, :, i].transpose(1, 2)).contiguous() for i in range(halves.shape[2]))
    return QuantWeight((codes ^ 128).view(torch.int8) if bits == 8 else codes, scales, *minimums)
