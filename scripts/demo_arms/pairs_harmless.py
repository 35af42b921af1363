"""Makes preference pairs for the `harmless` ARM from HH-RLHF transcripts, as chat messages.

The last turns of each transcript are kept, from a user's turn on, as many as fit. Both responses are cut to the same
number of tokens. A sum of log-probabilities follows length before anything else (correlation -0.94 on the whole
responses), so a pair of unequal lengths teaches little else. Cutting also makes long responses usable. The training
pairs are the clearest ones: those whose words speak most for the label, by a linear classifier that was fitted on other
training pairs. pairs_helpful.py shares this code.

All lines whose number (from 0) is divisible by 5 are held out. They are written to a file of their own, and to another
one with whole responses, for score_pairs.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from preference import write_jsonl
from prompts import SEED
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from genarm_fast.text.messages import Message
from genarm_fast.text.transcripts import transcript_messages
from genarm_fast.train.data import load_pairs

HOLD_OUT_EVERY = 5
MAX_PROMPT_TOKENS = 96
MIN_RESPONSE_TOKENS, MAX_RESPONSE_TOKENS = 6, 48


def last_turns(messages: list[Message], tokenizer, max_tokens: int) -> list[Message]:
    """Return the longest ending that starts with a user turn and has at most `max_tokens` tokens, or [] if none has."""
    lengths = [len(tokenizer(message["content"])["input_ids"]) for message in messages]
    for start in range(len(messages)):
        if messages[start]["role"] == "user" and sum(lengths[start:]) <= max_tokens:
            return messages[start:]
    return []


def cut(responses: list[str], tokenizer, max_tokens: int) -> tuple[list[str], int]:
    """Return the beginnings of the responses, cut to equally many tokens, and their number of tokens."""
    ids = tokenizer(responses)["input_ids"]
    tokens = min(max_tokens, *map(len, ids))
    return [tokenizer.decode(row[:tokens]).rstrip("\ufffd") for row in ids], tokens


def split(
    files: Iterable[Path], tokenizer, max_prompt_tokens: int, max_response_tokens: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (training, held-out) pairs that fit, in the files' order. max_response_tokens: None keeps all tokens."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for pair in (pair for path in files for pair in load_pairs(str(path)).pairs):  # pair.row counts within its file
        prompt = last_turns(transcript_messages(str(pair.prompt)), tokenizer, max_prompt_tokens)
        responses = [pair.chosen.strip(), pair.rejected.strip()]
        beginnings, tokens = cut(responses, tokenizer, max_response_tokens or MAX_RESPONSE_TOKENS)
        if prompt and tokens >= MIN_RESPONSE_TOKENS and beginnings[0] != beginnings[1]:
            whole = max_response_tokens is None
            chosen, rejected = responses if whole else beginnings
            record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            sides[pair.row % HOLD_OUT_EVERY == 0].append(
                record | {"chosen_complete": whole, "rejected_complete": whole}
            )
    return sides


def clearest(pairs: list[dict[str, Any]], n: int, folds: int = 5) -> list[dict[str, Any]]:
    """Return the `n` pairs whose words speak most for the label, clearest first, by classifiers of the other folds."""
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit_transform(texts)
    differences = features[0::2] - features[1::2]
    fold = np.random.default_rng(SEED).permutation(len(pairs)) % folds
    confidence = np.empty(len(pairs))
    for i in range(folds):
        others = differences[fold != i]
        labels = np.repeat([True, False], others.shape[0])
        classifier = LogisticRegression(fit_intercept=False).fit(vstack([others, -others]), labels)
        confidence[fold == i] = classifier.decision_function(differences[fold == i])
    return [pairs[i] for i in np.argsort(-confidence)[:n]]


def main(name: str = "harmless", description: str | None = __doc__, default_pairs: int | None = 512) -> None:
    """Write <name>.jsonl, <name>-held-out.jsonl and <name>-held-out-whole.jsonl."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hh", nargs="+", type=Path, help="HH-RLHF .jsonl(.gz) of whole transcripts")
    parser.add_argument("output", type=Path, help=f"folder for {name}.jsonl and its held-out files")
    parser.add_argument("--base", help="model folder or hub id of the tokenizer; default: the demo's base")
    all_or = "all" if default_pairs is None else default_pairs
    parser.add_argument(
        "--pairs", type=int, default=default_pairs, help=f"training pairs, the clearest of all (default: {all_or})"
    )
    parser.add_argument("--max-prompt-tokens", type=int, default=MAX_PROMPT_TOKENS, help="without the template")
    parser.add_argument("--max-response-tokens", type=int, default=MAX_RESPONSE_TOKENS)
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()

    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)

    training, held_out = split(args.hh, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    clear = training if args.pairs is None else clearest(training, args.pairs)
    random.Random(SEED).shuffle(clear)
    write_jsonl(args.output / f"{name}.jsonl", clear)
    write_jsonl(args.output / f"{name}-held-out.jsonl", held_out)
    whole = split(args.hh, tokenizer, args.max_prompt_tokens, None)[1]
    write_jsonl(args.output / f"{name}-held-out-whole.jsonl", whole)
    print(f"{len(clear)} of {len(training)} training pairs, {len(held_out)} held out: {args.output}")


if __name__ == "__main__":
    main()
