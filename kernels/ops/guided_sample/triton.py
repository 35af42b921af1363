"""guided_sample on a GPU, in Triton: the maths are in reference.py.

    scores   grid (tiles, rows)   reads every logit once; writes (max, sum) of each tile, for log-probs also of each
                                  member, for filters also of groups of 32 tokens
    bound    grid (rows)          only with filters: a score that is at most the lowest score kept, from the groups
    collect  grid (tiles, rows)   only with filters: the scores of groups that reach the bound, mostly a few thousand
    draw     grid (rows)          the lowest score kept, by search over float32's own ordering; the tile, the token, and
                                  their log-probabilities

One warp takes one tile, so that its reductions stay in registers and a single row still fills a GPU. A kernel's results
are only read by later kernels. So the kernels need no atomics, no zeroed memory and no fences (docs/triton.md, "Why
launches").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._tensors import dense, in_memory, launching_on
from ..philox import as_int64
from .arguments import DTYPES, OFF, SamplingArguments
from .reference import GuidedSample
from .triton_common import COLDEST, GROUPS, MIN_P, POSITION, SEED, TEMPERATURE, TILE, TOP_K, TOP_P
from .triton_filters import bound_kernel, collect_kernel
from .triton_kernels import draw_kernel, scores_kernel

DTYPES_OF_LOGITS = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = (1 << 16) - 1  # limit of a grid's second dimension on CUDA
PLACES = {
    "temperature": TEMPERATURE.value,
    "top_k": TOP_K.value,
    "top_p": TOP_P.value,
    "min_p": MIN_P.value,
    "seeds": SEED.value,
    "positions": POSITION.value,
}
WARPS = {count: {"num_warps": count, "enable_fp_fusion": False} for count in (1, 4, 8, 16)}
NAMES = sorted(PLACES, key=PLACES.__getitem__)


class Plan:
    """Everything about a call's launches except the addresses of its tensors.

    A plan has the kernels and their grids, the arguments that depend on shapes alone, and the sizes of the scratch
    memory. Calls with other tensors of the same shapes and strides can use it again.
    """

    def __init__(self, arguments: SamplingArguments, parameters: tuple[Any, ...], weights: tuple[Any, ...]) -> None:
        """parameters, weights: tensors, or numbers for all rows, in the form that the kernels take."""
        base, bias = arguments.base_logits, arguments.logit_bias
        members = (base, *arguments.arm_logits)
        self.device, self.shape, self.members = base.device, base.shape[:-1], len(members)
        self.vocab = arguments.vocabulary
        self.rows, self.tiles = self.shape.numel(), triton.cdiv(self.vocab, TILE.value)
        self.block = self.shape[1] if len(self.shape) == 2 else 1
        self.logprobs = arguments.return_logprobs or arguments.top_logprobs > 0
        self.filters = any(arguments.filtering(name) for name in OFF)
        self.keep_scores = arguments.top_logprobs > 0
        self.member_strides, self.parameter_strides = _strides(members, 1), _strides(parameters, 0)
        table = weights[0] if weights and isinstance(weights[0], Tensor) else None
        self.s_weights = table.stride(0) if table is not None and table.ndim == 2 else 0
        self.s_bias = bias.stride(0) if bias is not None and bias.ndim == 2 else 0
        self.numbers = (*(not isinstance(value, Tensor) for value in parameters), table is None)  # WEIGHTS come last
        biased, logprobs, filters = bias is not None, self.logprobs, self.filters
        per_tile, per_row, size = (self.tiles, self.rows, 1), (self.rows, 1, 1), triton.next_power_of_2(self.tiles)
        tail, row_tail = (self.block, self.vocab), (self.block, self.vocab, self.tiles)
        self.scores_tail = (*tail, biased, logprobs, self.keep_scores, filters, self.numbers)
        self.bound_tail = (*row_tail, size, self.numbers)
        self.collect_tail = (*tail, biased, self.numbers)
        self.draw_tail = (*row_tail, biased, logprobs, filters, size, self.numbers)
        self.kernels = [(scores_kernel, per_tile, WARPS[1])]
        if filters:
            self.kernels += [(bound_kernel, per_row, WARPS[16]), (collect_kernel, per_tile, WARPS[1])]
        self.kernels += [(draw_kernel, per_row, WARPS[8 if filters else 4])]

    def scratch(self) -> tuple[tuple[int, torch.dtype], ...]:
        """Return the number of elements and the dtype of each piece of scratch memory.

        A kernel writes results for later kernels there: stats, flags, scores, groups, bounds, places, found. Pieces of
        size 0 are neither read nor written.
        """
        rows, tiles, filters = self.rows, self.tiles, self.filters
        return (
            ((2 + 2 * self.members * self.logprobs) * rows * tiles, torch.float32),
            (rows * tiles, torch.int32),
            (rows * tiles * TILE.value * self.keep_scores, torch.float32),
            (2 * rows * tiles * GROUPS.value * filters, torch.float32),
            (rows * filters, torch.float32),
            (rows * (tiles + 1) * filters, torch.int32),
            (rows * tiles * TILE.value * filters, torch.float32),
        )

    def outputs(self) -> list[Tensor]:
        """Return empty tensors: tokens, status, and with log-probs also logprobs and member_logprobs."""
        # torch.empty gets the shape's numbers one by one: a torch.Size takes it twice as long to read.
        shape, device = self.shape, self.device
        outputs = [torch.empty(*shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32)]
        if self.logprobs:
            outputs.append(torch.empty(*shape, dtype=torch.float32, device=device))
            outputs.append(torch.empty(self.members, *shape, dtype=torch.float32, device=device))
        return outputs

    def arguments(
        self,
        members: tuple[Any, ...],
        weights: tuple[Any, ...],
        bias: Any,
        parameters: tuple[Any, ...],
        scratch: Sequence[Any],
        outputs: Sequence[Any],
    ) -> list[tuple[Any, ...]]:
        """Return the arguments of each kernel in `kernels`, in order. Tensors may be given as addresses as well."""
        stats, flags, scores, groups, bounds, places, found = scratch
        logits = (members, *self.member_strides, weights, self.s_weights, bias, self.s_bias)
        values = (parameters, *self.parameter_strides)
        logprobs = outputs[2:] if self.logprobs else (stats, stats)
        launches: list[tuple[Any, ...]] = [(*logits, *values, stats, flags, scores, groups, *self.scores_tail)]
        if self.filters:
            launches += [(*values, stats, groups, bounds, places, *self.bound_tail)]
            launches += [(*logits, groups, bounds, places, found, *self.collect_tail)]
        tokens, status = outputs[:2]
        kept = (stats, flags, bounds, places, found, tokens, status, *logprobs, *self.draw_tail)
        return [*launches, (*logits, *values, *kept)]


def launch(arguments: SamplingArguments, remember: Callable[..., None] | None = None) -> GuidedSample | None:
    """Launch the kernels for checked arguments. None for dtypes that they do not read, and for too many rows.

    remember: called with the arguments, the plan and the compiled kernels, if no tensor had to be converted.

    The host reads nothing back, so a graph can capture the call. Parameters that are numbers become arguments of the
    kernels. A filter that is a tensor launches the kernels of filters, even if no row uses it. A filter that is off
    launches nothing.
    """
    members = (arguments.base_logits, *arguments.arm_logits)
    if not all(logits.dtype in DTYPES_OF_LOGITS for logits in members):
        return None
    if members[0].shape[:-1].numel() > MOST_ROWS:
        return None
    device, bias = arguments.base_logits.device, arguments.logit_bias
    given = arguments
    members = tuple(map(dense, members))
    if bias is not None:
        bias = dense(bias.to(device, torch.float32))
    arguments = arguments._replace(base_logits=members[0], arm_logits=members[1:], logit_bias=bias)
    parameters = tuple(_parameter(getattr(arguments, name), name, device) for name in NAMES)
    weights = _weights(arguments.weights, device)
    plan = Plan(arguments, parameters, weights)
    scratch = [torch.empty(size, dtype=dtype, device=device) for size, dtype in plan.scratch()]
    outputs = plan.outputs()
    with launching_on(device):
        values = plan.arguments(members, weights, scratch[0] if bias is None else bias, parameters, scratch, outputs)
        compiled = [kernel[grid](*each, **options) for (kernel, grid, options), each in zip(plan.kernels, values)]
        taken = set(map(id, (*members, *weights, *parameters, bias)))
        as_given = all(id(each) in taken for each in (*given, *given.arm_logits) if type(each) is Tensor)
        if remember is not None and as_given:
            remember(given, plan, compiled)
    if arguments.top_logprobs:
        outputs += _top(plan, arguments, parameters[TEMPERATURE.value], scratch[2], outputs)
    return GuidedSample(*outputs)


def _strides(tensors: Sequence[Any], trailing: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return each tensor's stride from row to row, and from position to position; 0 for numbers.

    trailing: number of last dimensions that are neither rows nor positions.
    """
    strides = [each.stride()[: each.ndim - trailing] if isinstance(each, Tensor) else () for each in tensors]
    padded = [(*each, 0, 0) for each in strides]
    return tuple(each[0] for each in padded), tuple(each[1] for each in padded)


def _parameter(value: Any, name: str, device: torch.device) -> Any:
    """Return a parameter in the form that the kernels take: a tensor, an int that int64 holds, or a float."""
    if isinstance(value, Tensor):
        return in_memory(value.to(device, DTYPES[name]))
    if value is None:
        value = OFF[name]
    if DTYPES[name].is_floating_point:
        return float(value)
    return as_int64(int(value)) if name == "seeds" else int(value)


def _weights(weights: Any, device: torch.device) -> tuple[Any, ...]:
    """Return the weights in the form that the kernels take: a tuple of numbers for all rows, or of one tensor."""
    if isinstance(weights, (list, tuple)) and not any(isinstance(each, (list, tuple)) for each in weights):
        return tuple(map(float, weights)) or (0.0,)  # Triton has no type for an empty tuple
    return (dense(torch.as_tensor(weights, dtype=torch.float32, device=device)),)


def _top(
    plan: Plan, arguments: SamplingArguments, temperature: Tensor | float, scores: Tensor, outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens and their log-probabilities.

    scores: the first kernel's scores, [rows · tiles · TILE]; outputs: the tensors of `Plan.outputs`, filled.
    """
    rows, shape, count = plan.rows, plan.shape, arguments.top_logprobs
    scores = scores.view(rows, plan.tiles * TILE.value)
    top = scores[:, : plan.vocab].topk(count, dim=-1)
    chosen = scores.gather(-1, outputs[0].view(rows, 1))
    heat = torch.as_tensor(temperature, dtype=torch.float32, device=plan.device)
    heat = heat[(..., *[None] * (len(shape) - heat.ndim))]
    coldness = torch.where(heat == 0, 1.0, 1 / heat.clamp_min(COLDEST.value)).expand(shape).reshape(rows, 1)
    logprobs = outputs[2].view(rows, 1) + (top.values - chosen) * coldness
    return top.indices.view(*shape, count), logprobs.view(*shape, count)
