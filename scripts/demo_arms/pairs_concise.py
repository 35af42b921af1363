"""Preference pairs for the `concise` ARM, from the base model's own samples (teacher_data.py).

The rejected answer is a sample, up to its last whole sentence; the chosen one is the opening, again of whole sentences,
of a sample for the same prompt, at most half as long. Both end, so what tells them apart is where they end.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from preference import to_record, write_jsonl
from prompts import SEED, training_prompts
from transformers import AutoTokenizer

SENTENCE_END = re.compile(r"[.!?][\"')]?(?=\s|$)")


def read_samples(folder: Path, tokenizer) -> dict[str, list[str]]:
    """Prompt → sampled answers, for prompts of the committed pool."""
    allowed, samples = set(training_prompts()), defaultdict(list)
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as shard:
            answers = np.split(shard["tokens"], np.cumsum(shard["lengths"])[:-1])
            for prompt, tokens in zip(shard["prompts"].tolist(), answers):
                if prompt in allowed:
                    samples[prompt].append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return samples


def openings(text: str) -> list[str]:
    """Everything up to each end of a sentence, shortest first. Numbers of a list ("1.") end no sentence."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[:end] for end in ends if not re.search(r"(^|\s)(\d+|[A-Z])\.$", text[:end])]


def pairs(answers: list[str], tokenizer, low: int, high: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(short, long) answers to one prompt: `low`..`high` tokens, and at least twice as many."""
    ends = [openings(answer) for answer in answers]
    for texts in ends:
        rejected = texts[-1] if texts else ""
        limit = min(high, len(tokenizer(rejected)["input_ids"]) // 2)
        other = rng.choice(ends)
        short = [text for text in other if low <= len(tokenizer(text)["input_ids"]) <= limit]
        if short:
            yield short[0], rejected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder that teacher_data.py wrote")
    parser.add_argument("output", type=Path, help="JSON lines file to write")
    parser.add_argument("--base", help="model folder or hub id of the tokenizer; default: the demo's base")
    parser.add_argument("--pairs", type=int, default=360)
    parser.add_argument("--min-tokens", type=int, default=8, help="of the chosen answer")
    parser.add_argument("--max-tokens", type=int, default=32, help="of the chosen answer")
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rng = random.Random(SEED)
    found = [
        to_record(prompt, chosen, rejected)
        for prompt, answers in read_samples(args.samples, tokenizer).items()
        for chosen, rejected in pairs(answers, tokenizer, args.min_tokens, args.max_tokens, rng)
    ]
    rng.shuffle(found)
    write_jsonl(args.output, found[: args.pairs])
    print(f"{min(args.pairs, len(found))} pairs of {len(found)} possible ones: {args.output}")


if __name__ == "__main__":
    main()
