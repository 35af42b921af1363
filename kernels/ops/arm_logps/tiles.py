"""The arithmetic on a tile of logits between two products of streamed.py, in PyTorch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .reference import accumulator


class Layer(NamedTuple):
    """The output layer's steps from a product h Wᵀ to the logits z."""

    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


class Sums(NamedTuple):
    """Running sums of M rows over the tiles so far. Each is [M, 1], in the dtype of `accumulator`."""

    top: Tensor  # maximum of the logits z
    total: Tensor  # Σ exp(z − top)
    chosen: Tensor  # logit of the label, z[y]; undefined before the label's tile


class Tiles(Protocol):
    """Arithmetic on tiles. A tile [M, columns] has the logits of M rows for a slice of the vocabulary."""

    buffers: int  # buffers of a block: with 1, `out` is the tile `logits` itself; with 2, another one

    def dtype(self, rows: Tensor) -> torch.dtype:
        """Return the dtype of tiles for these hidden states."""
        ...

    def logits_(self, out: Tensor, rows: Tensor, head: Tensor, tile: slice, layer: Layer) -> None:
        """Write the tile that `absorb` and `slopes_` read. rows: [M, H]; head: the tile's rows of W, [columns, H]."""
        ...

    def absorb(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, sums: Sums, wanted: bool
    ) -> Tensor | None:
        """Add a tile to the sums. If wanted, also write p_v z'_v to `out`, 0 at the label.

        p is the softmax over the tiles so far. Then the result, [M, 1], is the factor for sums over earlier tiles,
        whose p was larger. None if not wanted.
        """
        ...

    def slopes_(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, normaliser: Tensor, gains: Tensor
    ) -> None:
        """Write gain · (p_v − 1[v = y]) z'_v to `out`. normaliser, gains: [M, 1]."""
        ...


class PyTorchTiles:
    """Tiles in the dtype of sums. `logits_` writes complete logits, with bias, scale and softcap."""

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
    """Return the labels' columns in a tile, and whether each label is in the tile: both [M, 1].

    A label outside the tile has an arbitrary column.
    """
    columns = targets[:, None] - tile.start
    width = tile.stop - tile.start
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)
