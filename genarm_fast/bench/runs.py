"""Measure an unguided base beside the guided model, with and without drafts, on the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from genarm_fast.api import GenARM
from genarm_fast.bench.timing import LEAST_ROUNDS, Interval, clock_of, interval, take_turns
from genarm_fast.models.member import Member
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import SamplingParams
from genarm_fast.text.given import Prompt
from genarm_fast.text.prompts import left_padded

CONTENDERS = ("hugging_face", "base", "guided", "guided_drafts")
# Largest spread of a figure that can be trusted.
MAX_TRUSTED_SPREAD = 0.1


@dataclass(frozen=True)
class Drafts:
    """What speculation "auto" did in the timed rounds, and whether it changed a text, the warm-up's texts included.

    chosen: numbers of steps of the decode loop by what was chosen for them, such as "plain" or "small, k=3".
    """

    chosen: dict[str, int]
    drafted: int
    accepted: int
    tokens_per_step: float  # tokens of one text; 1 without drafts
    texts: int
    same_texts: int  # texts with the same tokens as without drafts


@dataclass(frozen=True)
class Measured:
    """The figures of one batch size. Times are of whole calls, prompts included.

    Contenders have their names from CONTENDERS. tokens_per_second: new tokens of all rows. milliseconds_per_token: for
    each row. relative_to: for both unguided contenders, how many times as fast each other contender was in the same
    round.
    """

    batch: int
    tokens_per_second: dict[str, Interval]
    milliseconds_per_token: dict[str, float]
    relative_to: dict[str, dict[str, Interval]]
    spreads: dict[str, float]  # the widest of each contender's intervals
    trusted: bool  # whether there were enough rounds, and no spread above MAX_TRUSTED_SPREAD
    prompt_tokens: tuple[int, int]  # fewest and most tokens, as the base reads the prompts
    clock: str
    drafts: Drafts


def measure(
    model: GenARM,
    prompts: Sequence[Prompt],
    *,
    batch: int,
    new_tokens: int,
    rounds: int,
    ran: Callable[[], Any] = lambda: None,
) -> Measured:
    """Time all contenders on `batch` prompts a round, sampled at T = 1 with the ARMs' weights.

    Each round takes the next prompts. Each contender has its own `GenARM` over the weights of `model`, so that it keeps
    its caches, graphs and what "auto" has learnt. ran: called after every call, 4 · (rounds + 1) times.
    """
    make = partial(GenARM, max_batch_size=batch, cache_bytes=model.cache_bytes)
    alone = make(model.members[:1], speculation="off")
    plain = make(model.members, speculation="off")
    drafting = make(model.members, speculation="auto")
    outputs: dict[str, list[GenerationOutput]] = {"base": [], "guided": [], "guided_drafts": []}
    learning: Counter[str] = Counter()

    def turns_prompts(turn: int) -> list[Prompt]:
        return [prompts[(turn * batch + i) % len(prompts)] for i in range(batch)]

    def hugging_face(turn: int) -> None:
        ids = [request.token_ids[0] for request in alone.prepare(turns_prompts(turn), max_new_tokens=new_tokens)]
        _hugging_face(model.base, ids, new_tokens, seed=turn)

    def generating(name: str, contender: GenARM) -> Callable[[int], None]:
        def run(turn: int) -> None:
            each = [
                SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, seed=batch * turn + i) for i in range(batch)
            ]
            outputs[name] += contender.generate(turns_prompts(turn), each)
            if turn == 0:
                learning.update(_chosen(contender))

        return run

    runs = {
        "hugging_face": hugging_face,
        "base": generating("base", alone),
        "guided": generating("guided", plain),
        "guided_drafts": generating("guided_drafts", drafting),
    }
    devices = {parameter.device for member in model.members for parameter in member.model.parameters()}
    clock_name, clock = clock_of(devices)
    seconds = take_turns(runs, rounds, clock, ran)

    speeds, relative = _figures(seconds, batch * new_tokens)
    spreads = {
        name: max(each[name].spread for each in (speeds, *relative.values()) if name in each) for name in CONTENDERS
    }
    lengths = [len(output.prompt_token_ids) for output in outputs["base"]]
    return Measured(
        batch=batch,
        tokens_per_second=speeds,
        milliseconds_per_token={name: 1e3 * batch / each.median for name, each in speeds.items()},
        relative_to=relative,
        spreads=spreads,
        trusted=rounds >= LEAST_ROUNDS and max(spreads.values()) <= MAX_TRUSTED_SPREAD,
        prompt_tokens=(min(lengths), max(lengths)),
        clock=clock_name,
        drafts=_drafts(outputs["guided"], outputs["guided_drafts"], batch, dict(_chosen(drafting) - learning)),
    )


def _figures(
    seconds: Mapping[str, Sequence[float]], tokens: int
) -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    """Return tokens per second, and the ratios to both unguided contenders, each taken within a round."""
    speeds = {name: interval([tokens / each for each in spent]) for name, spent in seconds.items()}
    relative = {
        unguided: {
            name: interval([before / after for before, after in zip(seconds[unguided], spent)])
            for name, spent in seconds.items()
            if name != unguided
        }
        for unguided in ("hugging_face", "base")
    }
    return speeds, relative


def _drafts(
    plain: Sequence[GenerationOutput], drafted: Sequence[GenerationOutput], warm_up: int, chosen: dict[str, int]
) -> Drafts:
    """Return what drafts did, from all outputs without and with drafts. The first `warm_up` outputs were not timed."""
    timed = drafted[warm_up:]
    return Drafts(
        chosen=chosen,
        drafted=sum(output.rounds.drafted for output in timed),
        accepted=sum(output.rounds.accepted for output in timed),
        tokens_per_step=sum(len(output.token_ids) for output in timed) / sum(o.rounds.rounds for o in timed),
        texts=len(plain),
        same_texts=sum(off.token_ids == auto.token_ids for off, auto in zip(plain, drafted)),
    )


def _chosen(model: GenARM) -> Counter[str]:
    """Return the steps so far by what was chosen for them; none if speculation is off."""
    found: Counter[str] = Counter()
    for stats in model.tuners.stats():
        found.update(stats["steps"])
    return found


def _hugging_face(base: Member, ids: Sequence[Sequence[int]], new_tokens: int, seed: int) -> None:
    tokens, mask = left_padded(ids, 0)
    torch.manual_seed(seed)
    base.model.generate(
        tokens.to(base.device),
        attention_mask=mask.to(base.device),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        # Otherwise the model's generation_config decides. Its filters would cost time that the other contenders don't
        # spend.
        do_sample=True,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
    )
