"""Measures how often an ARM on the base's own weights prefers the chosen response of held-out pairs, and why.

    python score_pairs.py harmless pairs/harmless-held-out.jsonl pairs/harmless-held-out-whole.jsonl

It ranks the responses by four scores: Σ log π of the base, Σ log π of the ARM, their difference, and length. By length,
the shorter response wins. The difference is what training added. It is also what guided decoding gains if the ARM
takes the place of the base as its own ARM.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from genarm_fast import ARM, GenARM
from genarm_fast.demo import arm, base


def scores(model: GenARM, pairs: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Σ log π_base, Σ log π_arm and the number of tokens of each pair's (chosen, rejected), [n, 2] each."""
    sides = []
    for side in ("chosen", "rejected"):
        complete = pairs[0][f"{side}_complete"]
        outputs = model.score([p["prompt"] for p in pairs], [p[side] for p in pairs], append_eos=complete)
        rows = [(sum(o.base_logprobs), sum(r.total for r in o.rewards.values()), len(o.token_ids)) for o in outputs]
        sides.append(np.array(rows, float).T)
    of_base, of_arm, tokens = np.stack(sides, -1)
    return of_base, of_arm, tokens


def accuracy(margins: np.ndarray) -> str:
    """Return the share of positive margins with the half-width of its 95 % interval. A tie counts half."""
    share = float(np.mean((margins > 0) + (margins == 0) / 2))
    return f"{share:.3f} ± {1.96 * (share * (1 - share) / len(margins)) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", help="a demo ARM, or an adapter's folder")
    parser.add_argument("pairs", nargs="+", type=Path, help="JSON lines, all responses whole or all cut")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    folder = args.arm if Path(args.arm).is_dir() else arm(args.arm)
    model = GenARM.from_pretrained(base(), [ARM(folder)], dtype=torch.float32, max_batch_size=args.batch_size)
    print("| pairs | n | base | ARM | ARM - base | shorter | margin and length, correlation: base, ARM, ARM - base |")
    print("|---" * 7 + "|")
    for path in args.pairs:
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        of_base, of_arm, tokens = (side[:, 0] - side[:, 1] for side in scores(model, pairs))
        margins = (of_base, of_arm, of_arm - of_base)
        varied = tokens.std() > 0.5
        follows = ", ".join(f"{np.corrcoef(m, tokens)[0, 1]:+.2f}" for m in margins) if varied else "equal lengths"
        cells = [path.stem, str(len(pairs)), *map(accuracy, margins), accuracy(-tokens), follows]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
