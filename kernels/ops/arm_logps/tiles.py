"""What is done to a tile of logits between its products, in PyTorch: the arithmetic of streamed.py."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .reference import accumulator


class Layer(NamedTuple):
    """What stands between a product and its logits."""

    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


class Sums(NamedTuple):
    """What is known of M rows, each [M, 1], in the dtype of sums."""

    top: Tensor  # the maximum over the vocabulary so far
    total: Tensor  # Σ exp(z − top)
    chosen: Tensor  # z[y], once its tile was there


class Tiles(Protocol):
    """Tiles are [M, columns], of rows M and a slice of the vocabulary; `out` may be the tile `logits` itself if one
    buffer is asked for."""

    buffers: int

    def dtype(self, rows: Tensor) -> torch.dtype:
        """Of tiles for these hidden states."""
        ...

    def logits_(self, out: Tensor, rows: Tensor, head: Tensor, tile: slice, layer: Layer) -> None:
        """Write what the other two read."""
        ...

    def absorb(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, sums: Sums, wanted: bool
    ) -> Tensor | None:
        """Take a tile into the sums. Where wanted, write p_v z'_v to `out`, 0 at the label, with p over what is known
        so far, and return by how much earlier such sums are too large, [M, 1]."""
        ...

    def slopes_(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, normaliser: Tensor, gains: Tensor
    ) -> None:
        """Write gain · (p_v − 1[v = y]) z'_v to `out`. normaliser, gains: [M, 1]."""
        ...


class PyTorchTiles:
    """In the dtype of sums: logits are finished when they are written."""

    buffers = 2

    def dtype(self, rows: Tensor) -> torch.dtype:
        return accumulator(rows.dtype)

    def logits_(self, out: Tensor, rows: Tensor, head: Tensor, tile: slice, layer: Layer) -> None:
        if out.dtype == rows.dtype:
            torch.mm(rows, head.T, out=out)
        else:
            out.copy_(rows @ head.T)
        if layer.bias is not None:
            out += layer.bias[tile]
        if layer.scale != 1.0:
            out *= layer.scale
        if layer.softcap is not None:
            out.div_(layer.softcap).tanh_().mul_(layer.softcap)

    def absorb(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, sums: Sums, wanted: bool
    ) -> Tensor | None:
        columns, inside = _label_columns(targets, tile)
        sums.chosen.copy_(logits.gather(1, columns).where(inside, sums.chosen))
        higher = torch.maximum(sums.top, logits.amax(1, keepdim=True))
        torch.sub(logits, higher, out=out).exp_()
        before = sums.total * (sums.top - higher).exp_()
        sums.total.copy_(before + out.sum(1, keepdim=True))
        sums.top.copy_(higher)
        if not wanted:
            return None
        out.scatter_(1, columns, out.gather(1, columns).masked_fill(inside, 0.0))
        if layer.softcap is not None:
            out *= cap_slope(logits, layer.softcap)
        out.div_(sums.total)
        return before / sums.total

    def slopes_(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, normaliser: Tensor, gains: Tensor
    ) -> None:
        torch.sub(logits, normaliser, out=out).exp_()
        columns, inside = _label_columns(targets, tile)
        out.scatter_add_(1, columns, -inside.to(out.dtype))
        if layer.softcap is not None:
            out *= cap_slope(logits, layer.softcap)
        out *= gains


def cap_slope(logits: Tensor, softcap: float) -> Tensor:
    return 1.0 - (logits / softcap).square_()


def _label_columns(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """[M, 1] columns of the labels in a tile, any column for a label outside it, and which are inside."""
    columns = targets[:, None] - tile.start
    width = tile.stop - tile.start
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)
