"""Translate what transformers' `generate` prepares for its decoding loop into `SamplingParams`.

A processor or criterion that `SamplingParams` has no field for is called as transformers calls it, with scores of the
guided distribution, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

# Each of these acts on every row separately and keeps nothing between calls, so it may be called with one row at a
# time.
ROW_BY_ROW = (
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.ExponentialDecayLengthPenalty,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.MinPLogitsWarper,
    lp.NoBadWordsLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.RepetitionPenaltyLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.SuppressTokensLogitsProcessor,
    lp.TemperatureLogitsWarper,
    lp.TopHLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.TypicalLogitsWarper,
)
WARPERS = (  # the order of `guided_sample` and of transformers
    (lp.TemperatureLogitsWarper, "temperature", "temperature"),
    (lp.TopKLogitsWarper, "top_k", "top_k"),
    (lp.TopPLogitsWarper, "top_p", "top_p"),
    (lp.MinPLogitsWarper, "min_p", "min_p"),
)


@dataclass
class Translated:
    """The settings of one `generate` in the engine's terms.

    params: fields of `SamplingParams`. processors: processors to call before the temperature, in this order. criteria:
    stopping criteria to ask after each token. eos: whether a token may end a text. Rows that have ended are then
    padded.
    """

    params: dict[str, Any]
    processors: list[Any] = field(default_factory=list)
    criteria: list[Any] = field(default_factory=list)
    eos: bool = False


def translated(
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    *,
    do_sample: bool,
    width: int,
    rows: int,
    vocab_size: int,
    also_stop: Sequence[int],
) -> Translated:
    """Translate the prepared lists of `generate`, for prompts padded to `width` tokens, [rows, width].

    also_stop: further token ids that end a text, if end-of-sequence ids do.

    Raises:
        ValueError: a processor that cannot be called row by row. The message names it.
    """
    limit, max_time, eos, criteria = math.inf, None, [], []
    for criterion in stopping_criteria:
        if type(criterion) is sc.MaxLengthCriteria:
            limit = min(limit, criterion.max_length)
        elif type(criterion) is sc.MaxTimeCriteria:
            max_time = criterion.max_time
        elif type(criterion) is sc.EosTokenCriteria:
            eos += criterion.eos_token_id.tolist()
        else:
            criteria.append(criterion)
    if not math.isfinite(limit):
        raise ValueError("max_length=None: expected max_new_tokens or max_length")
    stops = [token for token in eos if 0 <= token < vocab_size]  # -1, for example, is a way to have no end
    most = int(limit) - width
    params: dict[str, Any] = {
        "max_new_tokens": most,
        "max_time": max_time,
        # Only the EOS ids of the generation config count.
        "ignore_eos": True,
        "stop_token_ids": [*stops, *(also_stop if stops else ())],
        "temperature": 1.0 if do_sample else 0.0,
    }
    processors = list(logits_processor)
    if do_sample:
        _take_warpers(processors, params)
    _take_penalties(processors, params, width, most, set(eos), vocab_size)
    for processor in processors:
        if not isinstance(processor, (*ROW_BY_ROW, lp.PrefixConstrainedLogitsProcessor)):
            _check_own(processor, rows)
    return Translated(params, processors, criteria, bool(stops))


def _take_warpers(processors: list[Any], params: dict[str, Any]) -> None:
    """Move temperature, top-k, top-p and min-p from the end of the list to the parameters."""
    if processors and type(processors[-1]) is lp.LogitNormalization:
        processors.pop()  # drawing normalises
    kinds = [kind for kind, _, _ in WARPERS]
    # The index of the first warper of a run, in the order of WARPERS, that reaches the end of the list.
    at = len(processors)
    while at and type(processors[at - 1]) in kinds:
        place = kinds.index(type(processors[at - 1]))
        if at < len(processors) and place >= kinds.index(type(processors[at])):
            break
        if getattr(processors[at - 1], "filter_value", -math.inf) != -math.inf:
            break
        at -= 1
    for warper in processors[at:]:
        _, name, attribute = WARPERS[kinds.index(type(warper))]
        params[name] = getattr(warper, attribute)
    del processors[at:]


def _take_penalties(
    processors: list[Any], params: dict[str, Any], width: int, most: int, eos: set[int], vocab_size: int
) -> None:
    """Move a penalty and bans from the beginning of the list to the parameters. Their order does not matter."""
    while processors:
        first = processors[0]
        banned = {int(t) for t in getattr(first, "eos_token_id", ())} == eos
        if type(first) is lp.RepetitionPenaltyLogitsProcessor and not first.prompt_ignore_length:
            if "repetition_penalty" in params:
                return
            params["repetition_penalty"] = float(first.penalty)
        elif type(first) is lp.MinNewTokensLengthLogitsProcessor and banned and first.prompt_length_to_skip == width:
            params["min_new_tokens"] = max(params.get("min_new_tokens", 0), min(first.min_new_tokens, most))
        elif type(first) is lp.MinLengthLogitsProcessor and banned:
            params["min_new_tokens"] = max(params.get("min_new_tokens", 0), min(first.min_length - width, most))
        elif type(first) is lp.SuppressTokensLogitsProcessor:
            ids = [token for token in first.suppress_tokens.tolist() if 0 <= token < vocab_size]
            params["suppress_tokens"] = [*params.get("suppress_tokens", ()), *ids]
        else:
            return
        processors.pop(0)


def _check_own(processor: Any, rows: int) -> None:
    name = getattr(processor, "__name__", type(processor).__name__)
    if type(processor).__module__.startswith("transformers."):
        raise ValueError(
            f"logits_processor: {name} keeps a state of its own over all rows, and is not supported: expected none, or"
            " GenARMLogitsProcessor in transformers' own loop"
        )
    if rows > 1:
        raise ValueError(
            f"logits_processor: {name} would see each of the {rows} rows by itself, not all of them together: expected"
            " one row; or guided(..., logits_processors=[...]), which says that this is right; or GenARMLogitsProcessor"
            " in transformers' own loop"
        )


def for_row(processor: Callable[..., Tensor], row: int, padding: Tensor) -> Callable[..., Tensor]:
    """Return a processor of `generate` for one row. It gets the padding [p] that `generate` has on the left."""
    if type(processor) is lp.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        processor = lp.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)

    def call(input_ids: Tensor, scores: Tensor) -> Tensor:
        return processor(torch.cat([padding.to(input_ids)[None], input_ids], dim=-1), scores)

    return call
