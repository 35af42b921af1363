"""Choose the kernel that multiplies few rows on a GPU: cuBLAS's or this package's.

Each shape is measured once, and the choice is kept for the life of the process.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from genarm_fast.device.base import Device, WorkStream, out_of_memory
from genarm_fast.device.cuda import Cuda, power_of_two

MEASURED_ROWS = (1, 2, 4, 8, 16)  # measured numbers of rows; any other number counts as the next larger one
REPEATS = 5  # measured replays of a graph that holds the products of all layers
# Our kernel is chosen if it takes less than this share of cuBLAS's time. The margin covers the scatter of measurements.
MAX_TIME_SHARE = 0.97
# Largest distance of our product from cuBLAS's, as a share of the product's norm. In float32 cuBLAS may use TF32.
MAX_DISTANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-8}
logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    outputs: int
    inputs: int
    bias: bool
    rows: int


class Seconds(NamedTuple):
    """Seconds that one product takes by each kernel.

    few_rows: inf if our kernel fails or its result differs from cuBLAS's; `why` then gives the reason.
    """

    cublas: float
    few_rows: float
    why: str = ""

    @property
    def few_rows_is_faster(self) -> bool:
        return self.few_rows < MAX_TIME_SHARE * self.cublas


class Product(Protocol):
    """Linears of a decoder that need a kernel. kernel_row_counts: the numbers of rows that our kernel multiplies."""

    weight: Tensor
    bias: Tensor | None
    kernel_row_counts: frozenset[int]


measured: dict[Shape, Seconds] = {}


@torch.no_grad()
def choose(products: Sequence[Product], device: Device | None = None) -> str:
    """Set `kernel_row_counts` of each product of a decoder, and return a sentence about the choice; "" without a GPU.

    Products of one shape are measured together, layer after layer as in a forward, so that their weights are not in the
    cache. device: gives the clock and the graphs. Without graphs, the host's launches would be measured.
    """
    if device is None:
        if not all(product.weight.is_cuda for product in products):
            return ""
        device = Cuda()
    alike: dict[Shape, list[Product]] = defaultdict(list)
    for product in products:
        (outputs, inputs), weight = product.weight.shape, product.weight
        alike[Shape(weight.device, weight.dtype, outputs, inputs, product.bias is not None, 0)].append(product)
    chosen: Counter[bool] = Counter()
    streams = {where: device.stream(where) for where in {shape.device for shape in alike}}
    for shape, group in alike.items():
        for rows in MEASURED_ROWS:
            key = shape._replace(rows=rows)
            if key not in measured:
                measured[key] = _measured(key, group, device, streams[key.device])
                logger.info("%s: %s", key, measured[key])
            chosen[measured[key].few_rows_is_faster] += 1
        for product in group:
            product.kernel_row_counts = frozenset(
                rows for rows in MEASURED_ROWS if measured[shape._replace(rows=rows)].few_rows_is_faster
            )
    return f"of {chosen.total()} shapes of few rows, cuBLAS multiplies {chosen[False]} and our kernel {chosen[True]}"


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + bias by our kernel. Raises ValueError for an x that the kernel does not take."""
    from genarm_fast.kernels.small_linear.triton import launch  # triton is not on every platform

    found = launch(x, weight, bias)
    if found is None:
        raise ValueError(f"x of {tuple(x.shape)} and {x.dtype}, weight of {weight.dtype}: no kernel of few rows")
    return found


def serves(product: Product, x: Tensor) -> bool:
    """Whether our kernel was chosen for the number of rows of x."""
    return bool(product.kernel_row_counts) and power_of_two(x.shape[:-1].numel()) in product.kernel_row_counts


def _measured(shape: Shape, group: Sequence[Product], device: Device, stream: WorkStream) -> Seconds:
    x = torch.randn(shape.rows, shape.inputs, dtype=torch.float32, device=shape.device).to(shape.dtype)
    first = group[0]
    expected, why = functional.linear(x, first.weight, first.bias).float(), ""
    try:
        found = few_rows_linear(x, first.weight, first.bias).float()
        distance = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
        if not distance <= MAX_DISTANCE[shape.dtype] and float(expected.abs().max()) > 0:
            why = f"it is {distance:.2g} of the result away from cuBLAS"
    except Exception as error:
        if out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {error}"
    cublas = _seconds(functional.linear, x, group, device, stream)
    return Seconds(cublas, math.inf if why else _seconds(few_rows_linear, x, group, device, stream), why)


def _seconds(
    multiply: Callable[..., Tensor], x: Tensor, group: Sequence[Product], device: Device, stream: WorkStream
) -> float:
    """Return the seconds of one product: the median over replays that each compute the products of all layers."""

    def run() -> tuple[()]:
        for product in group:
            multiply(x, product.weight, product.bias)
        return ()

    def launch() -> None:
        device.launch(stream, "measure", device.repeat, stream, multiply, run)

    device.begin()
    for _ in range(max(device.launches_to_capture, 1)):
        launch()
    found = []
    for _ in range(REPEATS):
        start = device.mark(stream)
        launch()
        found.append(device.elapsed(start, device.mark(stream)))
    device.finish()
    device.forget(stream)
    return statistics.median(found) / len(group)
