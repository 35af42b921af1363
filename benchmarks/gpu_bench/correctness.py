"""Before anything is timed: tokens of whole texts against the reference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from genarm_fast import GenARM, demo
from genarm_fast.kernels.guided_sample import guided_sample_reference
from genarm_fast.kernels.philox import seed_tensor

from .measure import Bench, drafting
from .models import plain_tokenizer, with_lora


def small_tokens(bench: Bench) -> dict[str, Any]:
    """SmolLM2 with two LoRA ARMs in float32: every token is the reference's, greedy and sampled.

    Where it is not cached, the stand-in's base with random LoRAs; `models` says which it was.
    """
    pair = bench.pair()
    if pair.real:
        arms: list[Any] = [str(demo.arm(name)) for name in ("positive", "concise")]
        model = GenARM.from_pretrained(str(pair.folder), arms, dtype=torch.float32, speculation="off")
    else:
        base = copy.deepcopy(pair.base).to(bench.setting.device)
        arms = [with_lora(base, 1 + seed, bench.setting.rank) for seed in range(2)]
        tokenizer = plain_tokenizer(base.config.vocab_size)
        model = GenARM.from_pretrained(base, arms, tokenizer=tokenizer, speculation="off")
    found = {f"T = {t:g}": agreement(bench, model, pair.prompts, t) for t in (0.0, 1.0)}
    model.release()
    return {"models": pair.name, "equal": min(each["equal"] for each in found.values()), **found}


def widened_tokens(bench: Bench) -> dict[str, Any]:
    """The widened pair in the dtype of the rows: rounding may flip a draw that is a near-tie, and nothing else may."""
    model = widened_pair(bench)
    prompts = bench.pair().prompts
    plain = agreement(bench, model, prompts, 1.0)
    drafted = agreement(bench, model, prompts, 1.0, speculation=drafting(model.arm_names[0], bench.setting.drafts[0]))
    same = sum(one == other for one, other in zip(plain.pop("texts"), drafted.pop("texts"))) / plain["completions"]
    parameters = model.base.model.num_parameters()
    return {"models": bench.pair().name, "parameters": parameters, "equal": min(plain["equal"], drafted["equal"]),
            "plain": plain, "with drafts": drafted, "texts that drafts leave alone": same}  # fmt: skip


def widened_pair(bench: Bench) -> GenARM:
    """Base and ARM of the pair at the cost of larger ones."""
    base, arm = bench.pair().widened(bench.setting)
    return bench.decoder("widened", base, [arm], tokenizer=bench.pair().tokenizer)


@torch.inference_mode()
def agreement(
    bench: Bench, model: GenARM, prompts: Sequence[list[int]], temperature: float, *, speculation: Any = "off"
) -> dict[str, Any]:
    """Which share of the tokens is what the reference draws there, from transformers' logits of the text before it.

    Each token is judged after the text that was generated, so a draw that rounding flipped counts once.
    """
    texts, tokens = bench.setting.texts
    outputs = model.generate(
        list(prompts[:texts]), temperature=temperature, max_new_tokens=tokens, ignore_eos=True, seed=7,
        speculation=speculation,
    )  # fmt: skip
    equal = count = 0
    for output in outputs:
        start, ids = len(output.prompt_token_ids), output.prompt_token_ids + output.token_ids
        logits = []
        for member in model.members:
            given = torch.tensor([ids[:-1]], device=member.device)
            own = member.model(input_ids=given, use_cache=False).logits[:, start - 1 :, : model.vocab_size]
            logits.append(own.float().cpu())
        n = len(output.token_ids)
        drawn = guided_sample_reference(
            logits[0], tuple(logits[1:]), [arm.weight for arm in model.arms], temperature=temperature,
            seeds=seed_tensor([output.seed]), positions=torch.arange(n)[None],
        )  # fmt: skip
        equal += int((drawn.tokens[0] == torch.tensor(output.token_ids)).sum())
        count += n
    found: dict[str, Any] = {"completions": len(outputs), "tokens": count, "equal": equal / count}
    return found | {"texts": [output.token_ids for output in outputs]}
