"""`genarm-fast score --input` on preference pairs: each ARM's accuracy and margins."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from genarm_fast.cli.display import console
from genarm_fast.cli.loading import formatted, is_chat
from genarm_fast.cli.scoring import load_to_score, score_all
from genarm_fast.text.given import Prompt
from genarm_fast.text.prompts import encode_response
from genarm_fast.text.transcripts import transcript_messages
from genarm_fast.train.data import Pair, load_pairs
from genarm_fast.train.metrics import PairStats
from genarm_fast.utils.jsonlines import dumps, located

if TYPE_CHECKING:
    from genarm_fast.api import GenARM
    from genarm_fast.outputs import ScoreOutput

COLUMN_HEADINGS = {
    "accuracy": "accuracy",
    "accuracy_stderr": "± s.e.",
    "margin_mean": "mean margin",
    "margin_std": "its s.d.",
}


def score_pairs(args: argparse.Namespace) -> int:
    """Read pairs as training does, and compare the totals of chosen and rejected responses."""
    data = load_pairs(str(args.input))
    model = load_to_score(args)
    prompts: list[Prompt] = []
    responses: list[list[int]] = []
    for pair in data.pairs:
        with located(args.input, pair.line):
            prompt, chosen, rejected = _encoded(args, model, pair)
        prompts += [prompt, prompt]
        responses += [chosen, rejected]
    lines = [pair.line for pair in data.pairs for _ in range(2)]
    totals = _totals(model, score_all(model, args.input, lines, prompts, responses))
    summaries = {name: _summary(sums, [len(response) for response in responses]) for name, sums in totals.items()}
    if args.json:
        scores = [
            {
                "row": pair.row,
                "chosen": {name: sums[2 * at] for name, sums in totals.items()},
                "rejected": {name: sums[2 * at + 1] for name, sums in totals.items()},
            }
            for at, pair in enumerate(data.pairs)
        ]
        print(dumps({"pairs": len(data.pairs), "dropped": data.dropped, "summary": summaries, "scores": scores}))
        return 0
    dropped = ", ".join(f"{count} {reason}" for reason, count in data.dropped.items())
    title = f"{len(data.pairs)} pairs" + (f" (dropped: {dropped})" if dropped else "")
    table = Table("reward", title=title, title_justify="left")
    for heading in COLUMN_HEADINGS.values():
        table.add_column(heading, justify="right")
    for name, summary in summaries.items():
        table.add_row(name, *(f"{summary[key]:.3f}" for key in COLUMN_HEADINGS))
    console().print(table)
    return 0


def _encoded(args: argparse.Namespace, model: GenARM, pair: Pair) -> tuple[Prompt, list[int], list[int]]:
    """Return the prompt and the token ids of both responses. As in training, a cut response gets no end token."""
    prompt: Prompt = pair.prompt
    texts = []
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not isinstance(side, str) or pair.options:
            raise ValueError(f"field {name!r}: expected text to score; messages with more, and tools, are for training")
        texts.append(side)
    if isinstance(prompt, str) and is_chat(args, model) and (messages := transcript_messages(prompt)):
        prompt, texts = messages, [text.strip() for text in texts]
    prompt = formatted(args, model, prompt)
    chosen, rejected = (
        encode_response(model.base, prompt, text, model.eos_token_ids, append_end=complete)
        for text, complete in zip(texts, (pair.chosen_complete, pair.rejected_complete))
    )
    return prompt, chosen, rejected


def _totals(model: GenARM, outputs: Sequence[ScoreOutput]) -> dict[str, list[float]]:
    """Return total rewards of all responses: of the base as a control, of each ARM, and of all ARMs, weighted."""
    totals = {"(base)": [math.fsum(output.base_logprobs) for output in outputs]}
    totals |= {name: [output.rewards[name].total for output in outputs] for name in model.arm_names}
    if len(model.arms) > 1:
        weighted = zip(*([arm.weight * total for total in totals[arm.name]] for arm in model.arms))
        totals["(weighted sum)"] = [math.fsum(each) for each in weighted]
    return totals


def _summary(totals: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    stats = PairStats(1.0, list(totals[::2]), list(totals[1::2]), list(lengths[::2]), list(lengths[1::2]))
    # The loss needs β_r.
    return {name: value for name, value in stats.summary().items() if name not in ("pairs", "loss")}
