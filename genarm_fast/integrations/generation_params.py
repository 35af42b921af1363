"""What transformers' `generate` prepares for its decoding loop, in the words of `SamplingParams`.

Whatever has no word there is called as transformers calls it, with scores of the guided distribution, or refused.
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

# Each acts on a row by itself and keeps nothing from call to call, so one row at a time is what it would see anyway.
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
WARPERS = (  # in the order of `guided_sample`, which is that of transformers
    (lp.TemperatureLogitsWarper, "temperature", "temperature"),
    (lp.TopKLogitsWarper, "top_k", "top_k"),
    (lp.TopPLogitsWarper, "top_p", "top_p"),
    (lp.MinPLogitsWarper, "min_p", "min_p"),
)


@dataclass
class Translated:
    """params: fields of `SamplingParams`. processors: called before the temperature, in this order. criteria: asked
    after each token. eos: whether a text may end with a token, so that rows which ended are padded."""

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
    """The prepared lists of `generate` for prompts padded to `width` tokens, [rows, width].

    also_stop: token ids that end a text where end-of-sequence ids do.

    Raises:
        ValueError: a processor that cannot be had row by row, naming it.
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
    stops = [token for token in eos if 0 <= token < vocab_size]  # -1, say, is a way to have none
    most = int(limit) - width
    params: dict[str, Any] = {
        "max_new_tokens": most,
        "max_time": max_time,
        "ignore_eos": True,  # those of the generation config count, and no others
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
    """Move temperature, top-k, top-p and min-p at the end of the list to the parameters."""
    if processors and type(processors[-1]) is lp.LogitNormalization:
        processors.pop()  # the draw normalises
    kinds = [kind for kind, _, _ in WARPERS]
    at = len(processors)  # of the first of a row of warpers, in their order, that goes to the end
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
    """Move what begins the list to the parameters: a penalty and bans, whose order does not matter."""
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
    """A processor of `generate` for one row: it sees the row with the padding [p] that `generate` has on its left."""
    if type(processor) is lp.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        processor = lp.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)

    def call(input_ids: Tensor, scores: Tensor) -> Tensor:
        return processor(torch.cat([padding.to(input_ids)[None], input_ids], dim=-1), scores)

    return call
