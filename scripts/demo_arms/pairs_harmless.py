"""Preference pairs for the `harmless` ARM from HH-RLHF transcripts, as chat messages.

Of each transcript the last user turns are kept, as many as fit. Both responses are cut to the same number of tokens: a
sum of log-probabilities follows length before anything else (correlation -0.94 on the whole responses), and a pair of
unequal ones teaches little else. It also lets long responses in. Lines whose number (from 0) is divisible by 5 are held
out, in a file of their own, and once more as they are, for score_pairs.py.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from preference import write_jsonl
from prompts import SEED
from transformers import AutoTokenizer

from genarm_fast.train.data import Message, load_pairs
from genarm_fast.train.encode import transcript_messages

HOLD_OUT_EVERY = 5
MAX_PROMPT_TOKENS = 96
MIN_RESPONSE_TOKENS, MAX_RESPONSE_TOKENS = 6, 48


def last_turns(messages: list[Message], tokenizer, max_tokens: int) -> list[Message]:
    """The longest ending that starts with a user turn and has at most so many tokens; [] if none is that short."""
    lengths = [len(tokenizer(message["content"])["input_ids"]) for message in messages]
    for start in range(len(messages)):
        if messages[start]["role"] == "user" and sum(lengths[start:]) <= max_tokens:
            return messages[start:]
    return []


def cut(responses: list[str], tokenizer, max_tokens: int) -> tuple[list[str], int]:
    """The responses' beginnings of equally many tokens, and how many those are."""
    ids = tokenizer(responses)["input_ids"]
    tokens = min(max_tokens, *map(len, ids))
    return [tokenizer.decode(row[:tokens]).rstrip("\ufffd") for row in ids], tokens


def split(
    hh: Path, tokenizer, max_prompt_tokens: int, max_response_tokens: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) pairs that fit, in the file's order; `max_response_tokens` None: whole responses."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for pair in load_pairs(str(hh)).pairs:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hh", type=Path, help="HH-RLHF .jsonl(.gz) of whole transcripts")
    parser.add_argument("output", type=Path, help="folder for harmless.jsonl and its held-out files")
    parser.add_argument("--base", help="model folder or hub id of the tokenizer; default: the demo's base")
    parser.add_argument("--pairs", type=int, help="training pairs; default: all")
    parser.add_argument("--max-prompt-tokens", type=int, default=MAX_PROMPT_TOKENS, help="without the template")
    parser.add_argument("--max-response-tokens", type=int, default=MAX_RESPONSE_TOKENS)
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()

    tokenizer = AutoTokenizer.from_pretrained(args.base)

    training, held_out = split(args.hh, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    random.Random(SEED).shuffle(training)
    write_jsonl(args.output / "harmless.jsonl", training[: args.pairs])
    write_jsonl(args.output / "harmless-held-out.jsonl", held_out)
    whole = split(args.hh, tokenizer, args.max_prompt_tokens, None)[1]
    write_jsonl(args.output / "harmless-held-out-whole.jsonl", whole)
    kept = len(training[: args.pairs])
    print(f"{kept} of {len(training)} training pairs, {len(held_out)} held out: {args.output}")


if __name__ == "__main__":
    main()
