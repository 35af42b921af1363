"""The engine inside transformers' `model.generate(..., custom_generate=guided(arms))`.

`generate` prepares inputs, generation config, processors and criteria as always. It then calls the callable with them
in place of its own decoding loop. So every program that only knows `model.generate` (pipelines, evaluation harnesses)
decodes with the engine: drafts, LoRA lanes, no padding. The tokens are those of `GenARM.generate`, for the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, StoppingCriteriaList

from genarm_fast.api import GenARM
from genarm_fast.engine.sequence import sample_seed
from genarm_fast.functional import kept_model, weights_or_own
from genarm_fast.integrations.generation_params import Translated, for_row, translated
from genarm_fast.kept import OPTIONS
from genarm_fast.models.arm import as_arms
from genarm_fast.params import SamplingParams
from genarm_fast.utils.checks import shown as shown_value

# Parameters for which transformers has no name. All others come from the call of `generate`.
GENARM_PARAMETERS = (
    "allowed_token_ids",
    "base_weight",
    "frequency_penalty",
    "logit_bias",
    "logits_processors",
    "presence_penalty",
    "priority",
    "stop",
    "stop_token_ids",
)
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
# `generate` prepares these.
PREPARED_INPUTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


def guided(arms: Any, *, weights: Any = None, streamer: Any = None, **options: Any) -> Guided:
    """Return a `custom_generate` for transformers: `model.generate(**inputs, custom_generate=guided(arms))`.

    `generate` then takes three more keywords: `weights` and `seed`, as in `SamplingParams`, and `prompts`, the texts or
    chats of the rows. With `prompts`, each ARM reads them in its own format; without, the ARMs read the tokens that the
    base reads. Without a seed, PyTorch's generator gives one, so that `torch.manual_seed` makes texts reproducible.

    Args:
        arms: one or several hub ids, folders, loaded models or `ARM`s.
        weights: as in `SamplingParams`.
        streamer: gets the prompt and the tokens of one row as they are made. `generate` does not pass its own streamer
            on.
        options: options of `GenARM.from_pretrained` (`tokenizer`, `speculation`, `max_batch_size`, ...), and those of
            `SamplingParams` for which transformers has no name: allowed_token_ids, base_weight, frequency_penalty,
            logit_bias, logits_processors, presence_penalty, priority, stop, stop_token_ids.

    Raises:
        TypeError, ValueError: an option that is neither of these, or a wrong value.
    """
    return Guided(arms, weights=weights, streamer=streamer, **options)


class Guided:
    """What `guided` returns. It loads the ARMs at its first call, and keeps them as `genarm_fast.generate` does."""

    def __init__(self, arms: Any, *, weights: Any, streamer: Any, **options: Any) -> None:
        self.arms, self.streamer = as_arms(arms), streamer
        if unknown := sorted(set(options) - set(OPTIONS) - set(GENARM_PARAMETERS)):
            known = ", ".join([*GENARM_PARAMETERS, *OPTIONS])
            raise TypeError(f"{unknown[0]}: expected one of {known}; all else is said to `generate`")
        self.loading = {name: value for name, value in options.items() if name in OPTIONS}
        self.sampling = {name: value for name, value in options.items() if name in GENARM_PARAMETERS}
        SamplingParams(weights=weights, **self.sampling)
        self.weights = weights
        self.speculation = self.loading.pop("speculation", None)
        if not (streamer is None or hasattr(streamer, "put")):
            raise TypeError(f"streamer={shown_value(streamer)}: expected one of transformers' streamers")

    @torch.no_grad()
    def __call__(
        self,
        model: GenerationMixin,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        *,
        weights: float | Sequence[float] | Mapping[str, float] | None = None,
        seed: int | None = None,
        prompts: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Decode the rows, as transformers calls it.

        input_ids: int64 [R, t], padded on the left. Returns int64 [R, t + longest], or an output object with that in
        `sequences`.

        Raises:
            TypeError, ValueError: before any work, naming what the engine cannot do or what is wrong.
            GenerationError: a row could not be decoded.
        """
        _check_config(generation_config)
        mask = _mask(input_ids, model_kwargs)
        prompt_ids = [ids[shown].tolist() for ids, shown in zip(input_ids, mask)]
        engine = kept_model(model, self.arms, self.loading)
        plan = translated(
            logits_processor,
            stopping_criteria,
            do_sample=bool(generation_config.do_sample),
            width=input_ids.shape[1],
            rows=len(input_ids),
            vocab_size=engine.vocab_size,
            also_stop=sorted(engine.base.stop_ids),
        )
        common = {**self.sampling, **plan.params}
        common["stop_token_ids"] += self.sampling.get("stop_token_ids", ())
        own_weights = tuple(float(arm.weight) for arm in self.arms)
        asked = self.weights if weights is None else weights
        common["weights"] = weights_or_own(asked, engine.arm_names, own_weights)
        copies = generation_config.num_return_sequences or 1
        seeds = _seeds(seed, len(input_ids), copies, draw=bool(generation_config.do_sample))
        own = tuple(common.pop("logits_processors", ()))
        params = [
            SamplingParams(
                **common,
                seed=seeds[r],
                logits_processors=[
                    *(for_row(each, r, ids[~mask[r]]) for each in plan.processors),
                    *own,
                ],
            )
            for r, ids in enumerate(input_ids)
        ]
        given = prompt_ids if prompts is None else _check_prompts(engine, prompts, prompt_ids, copies)
        columns = _columns(engine, given, params, plan, self.speculation, input_ids, generation_config, self.streamer)
        sequences = torch.cat([input_ids, *(column[:, None] for column in columns)], dim=-1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences


def _columns(
    engine: GenARM,
    prompts: list[Any],
    params: list[SamplingParams],
    plan: Translated,
    speculation: Any,
    input_ids: Tensor,
    config: Any,
    streamer: Any,
) -> list[Tensor]:
    """Return the new tokens of all rows, int64 [R] each, as transformers' loop would append them."""
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(params[0].stop_token_ids), 0)
    if not plan.criteria and streamer is None:
        texts = [output.token_ids for output in engine.generate(prompts, params, speculation=speculation)]
        width = max(map(len, texts))
        table = torch.tensor([text + [pad] * (width - len(text)) for text in texts], device=input_ids.device)
        return list(table.unbind(1))
    columns: list[Tensor] = []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    criteria = StoppingCriteriaList(plan.criteria)
    closed: set[int] = set()
    done = torch.zeros(len(prompts), dtype=torch.bool, device=input_ids.device)
    with engine.stream(prompts, params, speculation=speculation) as stream:
        for tokens in _lockstep(stream, len(prompts), pad, closed):
            columns.append(torch.tensor(tokens, device=input_ids.device))
            if streamer is not None:
                streamer.put(columns[-1].cpu())
            if criteria:
                seen = torch.cat([input_ids, *(column[:, None] for column in columns)], dim=-1)
                stopped = criteria(seen, None) & ~done
                done |= stopped
                if done.all():
                    break
                if plan.eos:  # without an end-of-sequence token, transformers lets stopped rows go on
                    for r in stopped.nonzero()[:, 0].tolist():
                        stream.close(r)
                        closed.add(r)
    if streamer is not None:
        streamer.end()
    return columns


def _lockstep(stream: Any, rows: int, pad: int, closed: set[int]) -> Iterator[list[int]]:
    """Yield the next token of every row, again and again; `pad` for rows that have ended or were closed."""
    waiting: list[list[int]] = [[] for _ in range(rows)]
    over: set[int] = set()
    while True:
        for r in closed - over:
            # Drafts may have brought several tokens at once.
            waiting[r].clear()
            over.add(r)
        while not all(line or r in over for r, line in enumerate(waiting)):
            chunk = next(stream, None)  # raises the error of a failed row after the other rows have ended
            if chunk is None:
                over.update(range(rows))
            else:
                waiting[chunk.index] += chunk.token_ids
                over.update([chunk.index] if chunk.finish_reason else [])
        if not any(waiting):
            return
        yield [line.pop(0) if line else pad for line in waiting]


def _check_config(config: Any) -> None:
    """Raises ValueError for settings that transformers supports and the engine does not."""
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={config.num_beams}: expected 1 with guided(); GenARMLogitsProcessor guides beam search"
        )
    if (mode := config.get_generation_mode()) not in MODES:
        raise ValueError(f"{mode.value}: expected greedy search or sampling with guided()")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, False):
            raise ValueError(f"{name}=True: expected False with guided(); GenARM.generate(logprobs=...) reports scores")


def _mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Return the mask of the rows, bool [R, t], False for padding.

    Raises:
        ValueError: inputs for the forward other than tokens, such as a filled cache.
    """
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    for name, value in model_kwargs.items():
        if name not in PREPARED_INPUTS and value is not None:
            raise ValueError(f"{name}: expected none with guided(), whose members read token ids alone")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"past_key_values of {cache.get_seq_length()} tokens: expected none, or an empty cache")
    positions = model_kwargs.get("position_ids")
    if positions is not None and bool(((positions - (mask.cumsum(-1) - 1)) * mask).any()):
        raise ValueError("position_ids: expected none, or each token at its place in its row")
    return mask.bool()


def _check_prompts(engine: GenARM, prompts: Any, rows: list[list[int]], copies: int) -> list[Any]:
    """Return the prompts, one for each row. Raises ValueError if the base reads one differently from `generate`."""
    requests = engine.prepare(prompts, SamplingParams(max_new_tokens=1))
    if len(requests) * copies != len(rows):
        raise ValueError(f"prompts: expected {len(rows) // copies}, one for each row of input_ids, got {len(requests)}")
    for r, ids in enumerate(rows):
        if (found := requests[r // copies].token_ids[0]) != ids:
            raise ValueError(
                f"prompts[{r // copies}]: the base reads {len(found)} tokens of it, which are not the {len(ids)} of"
                f" input_ids[{r}]: expected the texts that input_ids were made of"
            )
    return [requests[r // copies].prompt for r in range(len(rows))]


def _seeds(seed: int | None, rows: int, copies: int, *, draw: bool) -> list[int]:
    """Return one seed for each row: the seeds of the completions of `GenARM.generate(..., n=copies, seed=seed)`."""
    if seed is not None:
        firsts = [SamplingParams(seed=seed).seed or 0] * (rows // copies)
    elif draw:
        firsts = torch.randint(2**63 - 1, (rows // copies,)).tolist()
    else:
        firsts = [0] * (rows // copies)
    return [sample_seed(firsts[r // copies], r % copies) for r in range(rows)]
