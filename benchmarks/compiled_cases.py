"""The launches that compiled_kernels.py compiles. Each binds the kernels of an op to tensors of typical shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from genarm_fast.kernels.arm_logps.streamed import target_logps
from genarm_fast.kernels.arm_logps.tiles import Layer
from genarm_fast.kernels.arm_logps.triton import TILES
from genarm_fast.kernels.gated_mul import triton as gated_kernels
from genarm_fast.kernels.guided_sample.arguments import SamplingArguments
from genarm_fast.kernels.guided_sample.triton import launch as launch_sample
from genarm_fast.kernels.ngram_lookup.triton import launch as launch_lookup
from genarm_fast.kernels.ragged_attention import triton as attention_kernels
from genarm_fast.kernels.ragged_attention.triton_append import append as launch_append
from genarm_fast.kernels.rms_norm import triton as norm_kernels
from genarm_fast.kernels.rotary import triton as rotary_kernels
from genarm_fast.kernels.rotary_append import triton as rotary_append_kernels
from genarm_fast.kernels.settle.triton import launch as launch_settle
from genarm_fast.kernels.small_linear import triton as few_rows_kernels

BF16 = torch.bfloat16


def sample(
    *,
    arms: int = 1,
    vocab: int = 128256,
    dtype: torch.dtype = BF16,
    logit_bias: bool = False,
    numbers: bool = False,
    filters: bool = False,
    **options: Any,
) -> None:
    """Launch guided_sample once. Rows start at multiples of 16 bytes wherever V allows it.

    numbers: pass each parameter as one number for all rows, not as a tensor.
    """
    members = [torch.zeros(2, vocab, dtype=dtype) for _ in range(arms + 1)]
    row, weights = torch.zeros(2, dtype=torch.int64), torch.ones(2, arms)
    bias = torch.zeros(vocab) if logit_bias else None
    options |= {"top_k": 50, "top_p": 0.9, "min_p": 0.01} if filters else {}
    given = SamplingArguments(members[0], members[1:], weights, row, row, 1.0, logit_bias=bias, **options)
    if numbers:
        given = given._replace(weights=[1.0] * arms, seeds=1, positions=0)
    else:
        parameters = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        given = given._replace(**{k: torch.full((2,), v) for k, v in parameters.items() if v is not None})
    launch_sample(given)


def settle(drafts: int) -> None:
    rows = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    launch_settle(
        torch.zeros(2, drafts + 1, dtype=torch.int64),
        torch.zeros(2, drafts, dtype=torch.int64),
        lengths=rows[0],
        limits=rows[1],
        finished=torch.zeros(2, dtype=torch.bool),
        stop_ids=torch.zeros(2, 4, dtype=torch.int64),
        draft_counts=torch.zeros(2, dtype=torch.int64),
    )


def lookup() -> None:
    launch_lookup(torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 5, 4, 2)


def attend(
    heads: tuple[int, int] = (32, 8),
    block: int = 1,
    widths: tuple[int, int] = (128, 128),
    dtype: torch.dtype = BF16,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Launch ragged_attention, by default with the heads of Llama-3-8B; the last split of a tile combines all splits.

    For one token, also launch the form in which a second kernel combines the splits, and ragged_append.
    """
    query = torch.zeros(2, block, heads[0], widths[0], dtype=dtype).transpose(1, 2)
    keys, values = (torch.zeros(2, heads[1], 4096, width, dtype=dtype) for width in widths)
    slots, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, block, dtype=torch.int64)
    given, options = (query, keys, values, slots, positions), (widths[0] ** -0.5, window, softcap, None)
    attention_kernels.attention(*given, *options, torch.zeros(4096, dtype=torch.int32))
    if block == 1:
        attention_kernels.attention(*given, *options)
        launch_append(keys, values, keys[:, :, :1], values[:, :, :1], slots, positions)


def layer(
    rank: int = 0,
    hidden: int = 4096,
    inner: int = 14336,
    heads: tuple[int, int] = (32, 8),
    width: int = 128,
    dtype: torch.dtype = BF16,
    activation: str = "silu",
    norms: bool = False,
) -> None:
    """Launch the kernels of a decoder layer other than matrix products and attention.

    rank: rank of the two adapters whose B these kernels apply; 0 means no adapters.
    """

    def product(out: int, parts: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        y = torch.zeros(3, 1, out + 2 * parts * rank, dtype=dtype)
        return (
            (y, torch.zeros(2, rank, out, dtype=dtype), torch.zeros(3, dtype=torch.int64)) if rank else (y, None, None)
        )

    rows = torch.zeros(3, dtype=torch.int64)
    cache, weight = torch.zeros(3, heads[1], 16, width, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    angles, head = torch.zeros(3, 1, width, dtype=dtype), torch.zeros(width, dtype=dtype) if norms else None
    y, *lanes = product((heads[0] + 2 * heads[1]) * width, 3)
    bias = torch.zeros((heads[0] + 2 * heads[1]) * width, dtype=dtype) if norms else None
    norm_kernels.run(torch.zeros(3, 1, hidden, dtype=dtype), None, weight, 1e-5, 0.0)
    rotary_append_kernels.launch(y, angles, angles, cache, cache, rows, rows[:, None], head, head, 1e-6, bias, *lanes)
    y, *lanes = product(hidden, 1)
    norm_kernels.run(torch.zeros(3, 1, hidden, dtype=dtype), y, weight, 1e-5, 0.0, *lanes)
    y, *lanes = product(2 * inner, 2)
    gated_kernels.launch(y, activation, *lanes)


def rotary() -> None:
    query, angles = torch.zeros(2, 8, 3, 128, dtype=BF16), torch.zeros(2, 3, 128, dtype=BF16)
    rotary_kernels.launch(query, query, angles, angles, 1)


def logps(softcap: float | None = None, bias: bool = False, dtype: torch.dtype = BF16, vocab: int = 128256) -> None:
    """Launch the forward and backward kernels of a trained output layer.

    PyTorch computes the matrix products, so a hidden width of 1 is enough."""
    rows, weight = (torch.zeros(each, 1, dtype=dtype, requires_grad=True) for each in (2, vocab))
    layer = Layer(torch.zeros(vocab) if bias else None, 1.0, softcap)
    target_logps(rows, weight, torch.zeros(2, dtype=torch.int64), layer, TILES).sum().backward()


def few_rows(outputs: int, width: int, *, rows: int = 2, bias: bool = False, dtype: torch.dtype = BF16) -> None:
    x, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(outputs, width, dtype=dtype)
    few_rows_kernels.launch(x, weight, torch.zeros(outputs, dtype=dtype) if bias else None)


CASES: dict[str, Callable[[], None]] = {
    "base only": partial(sample, arms=0),
    "1 ARM": sample,
    "1 ARM, log-probs": partial(sample, return_logprobs=True),
    "1 ARM, float32": partial(sample, dtype=torch.float32),
    "1 ARM, V = 50257": partial(sample, vocab=50257),
    "3 ARMs, log-probs, bias": partial(sample, arms=3, return_logprobs=True, logit_bias=True),
    "1 ARM, numbers": partial(sample, numbers=True),
    "1 ARM, filters": partial(sample, filters=True),
    "1 ARM, filters, V = 262144": partial(sample, vocab=262144, filters=True),
    "1 ARM, filters, numbers, top-5": partial(sample, numbers=True, filters=True, top_logprobs=5),
    "5 drafts": partial(settle, 5),
    "n-grams": lookup,
    "8B layer": layer,
    "8B layer, r = 16": partial(layer, 16),
    "8B layer, r = 64": partial(layer, 64),
    "8B layer, r = 16, float32": partial(layer, 16, dtype=torch.float32),
    "0.5B layer, r = 8, norms, gelu": partial(layer, 8, 896, 4864, (14, 2), 64, activation="gelu", norms=True),
    "70B layer, r = 16, gelu_tanh": partial(layer, 16, 8192, 28672, (64, 8), activation="gelu_tanh"),
    "rotary": rotary,
    "few rows": partial(few_rows, 28672, 4096),
    "few rows, splits": partial(few_rows, 576, 1536, bias=True),
    "few rows, float32, splits": partial(few_rows, 576, 1536, dtype=torch.float32),
    "few rows, float32": partial(few_rows, 28672, 4096, dtype=torch.float32),
    "log-probs": logps,
    "log-probs, softcap, bias": partial(logps, softcap=30.0, bias=True),
    "log-probs, float32": partial(logps, dtype=torch.float32),
    "log-probs, V = 50257": partial(logps, vocab=50257),
    "8B": attend,
    "8B, q = 4": partial(attend, block=4),
    "8B, q = 5": partial(attend, block=5),
    "8B, q = 16": partial(attend, block=16),
    "70B": partial(attend, (64, 8)),
    "1B, q = 3": partial(attend, (32, 8), 3, (64, 64)),
    "1B, q = 9": partial(attend, (32, 8), 9, (64, 64)),
    "8B, q = 512": partial(attend, block=512),
    "8B, float32": partial(attend, dtype=torch.float32),
    "8B, float32, q = 16": partial(attend, block=16, dtype=torch.float32),
    "8B, float32, q = 512": partial(attend, block=512, dtype=torch.float32),
    "D = 80, float16": partial(attend, (32, 32), widths=(80, 80), dtype=torch.float16),
    "D = 96, Dv = 64, q = 5": partial(attend, (32, 32), 5, (96, 64)),
    "D = 64, window, q = 512": partial(attend, (14, 2), 512, (64, 64), window=1024),
    "D = 256, window, softcap, q = 5": partial(attend, (8, 4), 5, (256, 256), window=1024, softcap=50.0),
    "D = 256, window, softcap, q = 512": partial(attend, (8, 4), 512, (256, 256), window=1024, softcap=50.0),
}
