"""Weights of 8 and 4 bits: their values, and their layout in memory for the C++ core."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32  # inputs that share a scale
TILE = 32  # outputs whose codes are stored together
# The inputs of the codes in a dword (32 bits), from the lowest bits up. The core multiplies inputs in pairs, (0, 1),
# (2, 3) and so on. The low 16 bits have the first input of each pair, so that one shift and one mask unpack a pair.
ORDER = {8: (0, 2, 1, 3), 4: (0, 2, 4, 6, 1, 3, 5, 7)}
BOUNDS = {8: (-128, 127), 4: (0, 15)}


class QuantWeight(NamedTuple):
    """A weight w[o, i] = scales[o, i // 32] · codes[o, i] + minimums[o, i // 32].

    Weights of 8 bits have int8 codes -128..127 and no minimums. Weights of 4 bits have uint8 codes 0..15 and minimums.
    The last group of an output may have fewer than 32 inputs.
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
    """Return the bytes of a tile's group: codes, float16 scales, and with 4 bits float16 minimums."""
    return TILE * (GROUP * bits // 8 + (2 if bits == 8 else 4))


def check_weight(weight: QuantWeight) -> None:
    """Check a weight of 8 or 4 bits. Raises TypeError or ValueError that names the wrong part."""
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
    """Return a tensor [..., width] as [..., groups, 32]; the last group is filled up with zeros."""
    padded = functional.pad(tensor, (0, groups_of(width) * GROUP - width))
    return padded.unflatten(-1, (groups_of(width), GROUP))


def dequantize(weight: QuantWeight) -> Tensor:
    """Return scale · code + minimum, float32 [out, in], rounded at most once."""
    width = weight.codes.shape[1]
    values = in_groups(weight.codes, width).float().mul_(weight.scales.float()[..., None])  # exact: it has 19 bits
    if weight.minimums is not None:
        values += weight.minimums.float()[..., None]
    return values.flatten(-2)[:, :width]


def pack(weight: QuantWeight) -> Tensor:
    """Return the weight in the core's layout, uint8 [tiles, groups, group_bytes].

    A dword has the codes of 4 inputs (8 bits) or of 8 inputs (4 bits) of an output. The dwords of a tile's 32 outputs
    are adjacent, then follow those for the next inputs. Scales and minimums of the group come last. Codes of 8 bits are
    stored plus 128, which makes unpacking faster.
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
    """Return the weight that `pack` packed."""
    return _unpack_tiles(packed, bits, lambda part: part.flatten(0, 1)[:out], width)


def unpack_rows(packed: Tensor, rows: Tensor, width: int, bits: int) -> QuantWeight:
    """Return the weight's outputs `rows`, int64 [n], from a packed weight."""
    places = torch.arange(len(rows), device=packed.device), rows % TILE
    return _unpack_tiles(packed[rows // TILE], bits, lambda part: part[places], width)


def _unpack_tiles(packed: Tensor, bits: int, pick, width: int) -> QuantWeight:
    """Unpack the outputs that `pick` selects from a tensor [tiles, TILE, ...]."""
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
