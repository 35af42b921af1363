"""Makes preference pairs for the `concise` ARM from the base model's own samples (teacher_data.py).

The chosen answer is the opening of a sample, in whole sentences. The rejected answer continues it for a sentence or
two. Both answers end, so they differ only in where they end. When whole samples were rejected instead, the ARM learned
to avoid their words, and the guided text broke down into repetition.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from preference import to_record, write_jsonl
from prompts import SEED, training_prompts
from transformers import AutoTokenizer

SENTENCE_END = re.compile(r"[.!?][\"')]?(?=\s|$)")


def read_samples(folder: Path, tokenizer) -> dict[str, list[str]]:
    """Return the sampled answers to each prompt of the committed pool."""
    allowed, samples = set(training_prompts()), defaultdict(list)
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as shard:
            answers = np.split(shard["tokens"], np.cumsum(shard["lengths"])[:-1])
            for prompt, tokens in zip(shard["prompts"].tolist(), answers):
                if prompt in allowed:
                    samples[prompt].append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return samples


def openings(text: str) -> list[str]:
    """Return the text up to each end of a sentence, the shortest first. The number of a list item ("1.") ends none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[:end] for end in ends if not re.search(r"(^|\s)(\d+|[A-Z])\.$", text[:end])]


def pair(answer: str, tokenizer, low: int, high: int, more: int) -> tuple[str, str] | None:
    """Return the first opening of `low` to `high` tokens, and the next one that is at least `more` tokens longer.

    None if the answer does not have both."""
    ends = [(text, len(tokenizer(text)["input_ids"])) for text in openings(answer)]
    for short, length in ends:
        if low <= length <= high:
            longer = [text for text, other in ends if other >= length + more]
            return (short, longer[0]) if longer else None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder that teacher_data.py wrote")
    parser.add_argument("output", type=Path, help="JSON lines file to write")
    parser.add_argument("--base", help="model folder or hub id of the tokenizer; default: the demo's base")
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--min-tokens", type=int, default=8, help="of the chosen answer")
    parser.add_argument("--max-tokens", type=int, default=32, help="of the chosen answer")
    parser.add_argument("--more-tokens", type=int, default=12, help="at least, of the rejected answer")
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()

    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
    found = [
        to_record(prompt, *texts)
        for prompt, answers in read_samples(args.samples, tokenizer).items()
        for answer in answers
        if (texts := pair(answer, tokenizer, args.min_tokens, args.max_tokens, args.more_tokens))
    ]
    random.Random(SEED).shuffle(found)
    write_jsonl(args.output, found[: args.pairs])
    print(f"{min(args.pairs, len(found))} pairs of {len(found)} possible ones: {args.output}")


if __name__ == "__main__":
    main()
