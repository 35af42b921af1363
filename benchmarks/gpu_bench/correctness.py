"""Rows that compare the tokens of whole texts with the reference. They run before anything is timed."""

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
    """Compare SmolLM2 with two LoRA ARMs in float32: every token has to equal the reference's, greedy and sampled.

    If SmolLM2 is not cached, the base of the stand-in pair runs with random LoRAs. `models` names the models.
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
    """Compare the widened pair in the dtype of the other rows.

    Only rounding may change a token, where two tokens nearly tie in a draw.
    """
    model = widened_pair(bench)
    prompts = bench.pair().prompts
    plain = agreement(bench, model, prompts, 1.0)
    drafted = agreement(bench, model, prompts, 1.0, speculation=drafting(model.arm_names[0], bench.setting.drafts[0]))
    same = sum(one == other for one, other in zip(plain.pop("texts"), drafted.pop("texts"))) / plain["completions"]
    parameters = model.base.model.num_parameters()
    return {"models": bench.pair().name, "parameters": parameters, "equal": min(plain["equal"], drafted["equal"]),
            "plain": plain, "with drafts": drafted, "texts that drafts leave alone": same}  # fmt: skip


def widened_pair(bench: Bench) -> GenARM:
    """Return a decoder of the widened pair: its base and ARM cost as much as larger models."""
    base, arm = bench.pair().widened(bench.setting)
    return bench.decoder("widened", base, [arm], tokenizer=bench.pair().tokenizer)


@torch.inference_mode()
def agreement(
    bench: Bench, model: GenARM, prompts: Sequence[list[int]], temperature: float, *, speculation: Any = "off"
) -> dict[str, Any]:
    """Return the share of generated tokens that equal the reference's draw at their position.

    The reference draws from transformers' logits of the generated text before the token. A draw that rounding changed
    therefore counts once, and leaves the tokens after it equal.
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
