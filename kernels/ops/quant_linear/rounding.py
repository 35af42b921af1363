"""Find weights of 8 or 4 bits for a matrix: the nearest ones, or those from which it comes back bit for bit.

A checkpoint that was dequantised from GGUF's Q8_0, Q4_0 or Q4_1 holds bfloat16(scale · code + minimum), in groups of
32. Its codes can be found from its values, because the values of a group are on a grid of 255 or 16 points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .weights import QuantWeight, dequantize, in_groups

NEIGHBOURS = sorted(range(-8, 9), key=abs)  # scales that are tried, in float16 numbers from the best fit
# Steps of a 4-bit grid that are tried between the smallest and the largest value of a group. A negative number tries a
# negative scale, so that code 0 stands for the largest value.
STEPS = [way * steps for steps in range(15, 0, -1) for way in (1, -1)]
CHUNK = 1 << 17  # weights handled at a time, so that their float32 copies stay in the cache


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16)


def _moved(halves: Tensor, by: int) -> Tensor:
    """Return the float16 numbers `by` places away: away from zero if positive. The result is never NaN or infinite."""
    bits = halves.view(torch.int16).to(torch.int32)
    magnitude = ((bits & 0x7FFF) + by).clamp(0, 0x7BFF)
    return ((bits & -0x8000) | magnitude).to(torch.int16).view(torch.float16)


def _nearest(groups: Tensor, bits: int) -> QuantWeight:
    """Return the nearest weight with codes [out, groups · 32] for groups float32 [out, groups, 32] from `_filled`."""
    if bits == 8:
        scales = _half(groups.abs().amax(-1) / 127)
        low = groups.new_zeros(())
    else:
        low = groups.amin(-1)
        scales = _half((groups.amax(-1) - low) / 15)
    minimums = None if bits == 8 else _half(low)
    start = 0.0 if minimums is None else minimums.float()[..., None]
    step = scales.float()[..., None]
    codes = ((groups - start) / step.masked_fill(step == 0, torch.inf)).round()
    codes = codes.clamp(-127, 127).to(torch.int8) if bits == 8 else codes.clamp(0, 15).to(torch.uint8)
    return QuantWeight(codes.flatten(1), scales, minimums)


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight of shape {tuple(weight.shape)}, {weight.dtype}: expected [out, in], floating point")
    if not weight.isfinite().all():
        raise ValueError(f"weight: {int((~weight.isfinite()).sum())} values are NaN or infinite: expected numbers")


def _rows(weight: Tensor) -> Sequence[Tensor]:
    return weight.split(max(CHUNK // max(weight.shape[1], 1), 1))


def _join(parts: list[QuantWeight], width: int) -> QuantWeight:
    codes, scales, minimums = zip(*parts)
    lows = None if minimums[0] is None else torch.cat(minimums)
    return QuantWeight(torch.cat(codes)[:, :width].contiguous(), torch.cat(scales), lows)


def quantize(weight: Tensor, bits: int) -> QuantWeight:
    """Return the nearest weight of 8 or 4 bits.

    The scale of 8 bits is the largest magnitude of a group / 127. The 16 codes of 4 bits go from a group's smallest
    value to its largest.

    weight: [out, in], floating point; the last group of an output may be short.

    Raises ValueError for other bits or shapes, NaN, infinities, and values whose scale float16 does not hold.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits={bits!r}: expected 8 or 4")
    _check(weight)
    width = weight.shape[1]
    made = _join([_nearest(_filled(rows.float()), bits) for rows in _rows(weight)], width)
    for part in made[1:]:
        if part is not None and not part.isfinite().all():
            raise ValueError(f"weight up to {float(weight.abs().max()):g}: expected values whose scales float16 holds")
    return made


def _filled(rows: Tensor) -> Tensor:
    """Return rows [out, in] as [out, groups, 32].

    A short group repeats its last value, which changes neither its minimum nor its scale.
    """
    short = -rows.shape[1] % 32
    if not short or not rows.shape[1]:
        return in_groups(rows, rows.shape[1])
    return torch.cat((rows, rows[:, -1:].expand(-1, short)), 1).unflatten(-1, (-1, 32))


def exact(weight: Tensor, bits: int) -> QuantWeight | None:
    """Return a weight that `dequantize` and rounding turn into this bfloat16 matrix bit for bit.

    None if the search finds no such weight, or if the matrix is not bfloat16 or not finite.
    """
    if weight.dtype != torch.bfloat16 or not weight.isfinite().all():
        return None
    found = None
    if _native.core is not None:
        found = _native.core.exact_codes(weight.detach().contiguous(), bits)
    if found is None:
        found = exact_in_pytorch(weight, bits)
    if not found:
        return None
    codes, scales, lows = found
    return QuantWeight(codes[:, : weight.shape[1]].contiguous(), scales, None if bits == 8 else lows)


def exact_in_pytorch(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what the core's `exact_codes` finds: codes [out, groups · 32], scales and minimums [out, groups].

    The search takes about ten times as long here. None if it finds nothing.
    """
    if _search(_filled(weight[:16]).flatten(0, 1), bits) is None:  # 16 outputs first, to avoid most vain searches
        return None
    found = _search(_filled(weight).flatten(0, 1), bits)
    if found is None:
        return None
    codes, scales, lows = (part.view(len(weight), -1) for part in found)
    return codes, scales, lows


def _search(wanted: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return codes, scales and minimums of each group of wanted bfloat16 values [groups, 32]; None if one has none."""
    codes = torch.zeros(wanted.shape, dtype=torch.int8 if bits == 8 else torch.uint8, device=wanted.device)
    scales, lows = torch.zeros(2, len(wanted), dtype=torch.float16, device=wanted.device)
    left = torch.arange(len(wanted), device=wanted.device)
    for steps in (127,) if bits == 8 else STEPS:
        lost = []
        for part in left.split(CHUNK // 32):
            found, *parts = (_fit_8 if bits == 8 else _fit_4)(wanted[part], steps)
            at = part[found]
            codes[at], scales[at], lows[at] = (values[found] for values in parts)
            lost.append(part[~found])
        left = torch.cat(lost) if lost else left
        if not len(left):
            return codes, scales, lows
    return None


def _bounds(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 numbers (low, high) between which every number rounds to this bfloat16.

    The bounds themselves may round to this bfloat16, or to its neighbour.
    """
    bits = wanted.float().view(torch.int32)
    negative, magnitude = bits < 0, bits & 0x7FFFFFFF
    near = (magnitude - 0x8000).clamp(min=-1).view(torch.float32).masked_fill(magnitude == 0, 0.0)
    far = (magnitude + 0x8000).view(torch.float32)
    near = torch.where(magnitude == 0, -far, near)
    return torch.where(negative, -far, near), torch.where(negative, -near, far)


def _gives(wanted: Tensor, codes: Tensor, scale: Tensor, low: Tensor | None) -> Tensor:
    made = dequantize(QuantWeight(codes, scale[:, None], None if low is None else low[:, None]))
    return (made.to(torch.bfloat16) == wanted).all(-1)


Fit = tuple[Tensor, Tensor, Tensor, Tensor]  # found [groups] bool, codes [groups, 32], scales and minimums [groups]


def _fit_8(wanted: Tensor, steps: int) -> Fit:
    values = wanted.float()
    best = _half(values.abs().amax(-1) / steps)  # not exact, because the largest value was rounded to bfloat16
    found = torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
    codes, scales = torch.zeros_like(wanted, dtype=torch.int8), torch.zeros_like(best)
    left = torch.arange(len(wanted), device=wanted.device)
    for by in NEIGHBOURS:
        scale = _moved(best[left], by)
        step = scale.float()[:, None]
        tried = (values[left] / step.masked_fill(step == 0, 1)).round().clamp(-127, 127).to(torch.int8)
        right = _gives(wanted[left], tried, scale, None)
        at = left[right]
        found[at], codes[at], scales[at] = True, tried[right], scale[right]
        left = left[~right]
        if not len(left):
            break
    return found, codes, scales, torch.zeros_like(scales)


def _fit_4(wanted: Tensor, steps: int) -> Fit:
    values = wanted.float()
    ends = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    start = ends[steps < 0]
    step = (ends[1] - ends[0]) / steps
    codes = ((values - start) / step.masked_fill(step == 0, 1)).round()
    # Fit the scale by least squares. In float64 these sums are exact in any order, unless the group spans 2^40.
    wide, wanted_wide = codes.double(), values.double()
    total = wide.sum(-1)
    spread = 32 * wide.square().sum(-1) - total.square()
    product = 32 * (wide * wanted_wide).sum(-1) - total * wanted_wide.sum(-1)
    best = _half((product / spread.masked_fill(spread == 0, 1)).float())
    low, high = _bounds(wanted)
    found = torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
    scales, lows = torch.zeros_like(best), torch.zeros_like(best)
    left = torch.arange(len(wanted), device=wanted.device)
    for by in NEIGHBOURS:
        scale = _moved(best[left], by)
        grid = codes[left] * scale.float()[:, None]
        least, most = (low[left] - grid).amax(-1), (high[left] - grid).amin(-1)
        minimum = _half((least + most) / 2)
        nearest, right = minimum, torch.zeros_like(left, dtype=torch.bool)
        # Two float16 numbers may be equally near to the middle, both at an end of the range. There a value may round to
        # the neighbour of the wanted bfloat16, so the next numbers are tried too.
        for place in (0, 1, -1):
            near = _moved(nearest, place)
            tried = ~right & nearest.isfinite()
            if place:
                tried &= (near.float() >= least) & (near.float() <= most)
            fits = tried & _gives(wanted[left], codes[left].to(torch.uint8), scale, near)
            minimum, right = torch.where(fits, near, minimum), right | fits
        at = left[right]
        found[at], scales[at], lows[at] = True, scale[right], minimum[right]
        left = left[~right]
        if not len(left):
            break
    return found, codes.to(torch.uint8), scales, lows
