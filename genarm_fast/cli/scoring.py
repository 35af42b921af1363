"""The parts that scoring responses and scoring pairs share: loading, checks and progress."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from genarm_fast.cli.display import console
from genarm_fast.cli.loading import load
from genarm_fast.utils.jsonlines import located

if TYPE_CHECKING:
    from genarm_fast.api import GenARM
    from genarm_fast.outputs import ScoreOutput


def load_to_score(args: argparse.Namespace) -> GenARM:
    """Load the models. If an ARM was trained on texts, text prompts stay texts unless the options say otherwise."""
    model = load(args)
    if args.chat is None and any(member.prompt_format in ("text", "transcript") for member in model.arms):
        args.chat = False
    return model


def score_all(
    model: GenARM, path: Path, lines: Sequence[int], prompts: Sequence[Any], responses: Sequence[str | list[int]]
) -> list[ScoreOutput]:
    """Run `model.score` with a progress bar. All prompts are checked first; errors name the input line."""
    from genarm_fast.text.messages import check_plain
    from genarm_fast.text.templates import encoded

    for line, prompt, response in zip(lines, prompts, responses):
        with located(path, line):
            if isinstance(response, str):
                check_plain("response", response)
                length = len(encoded(model.tokenizer, response)) + 1  # one more for the end of sequence
            else:
                length = len(response)
            model.prepare([prompt], max_new_tokens=length)
    outputs: list[ScoreOutput] = []
    # Within a group of this size, texts of similar length share a batch.
    size = 4 * model.max_batch_size
    for at in track(range(0, len(lines), size), "scoring", console=console(stderr=True), transient=True):
        outputs += model.score(prompts[at : at + size], responses[at : at + size])
    return outputs
