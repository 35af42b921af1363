"""Direct preference optimisation, through TRL: the policy that alignment in training gives from the ARMs' pairs.

    python benchmarks/baselines/dpo.py BASE PAIRS OUTPUT [--max-pairs N] [--beta 0.1]

    L = −log σ(β [log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)])

The reference is the base, the LoRA and its schedule are the ARMs'. An ARM's loss is this one without π_ref. The
result decodes as any model does: `plain` is what is compared.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.interface import Member, Params, Response
from baselines.likelihoods import rankings
from baselines.mixture import mixture
from baselines.pairs import BATCH, chosen_pairs, command_line, dataset, lora, split, training_arguments
from genarm_fast.train.data import Pair


def plain(policy: Member, prompts: list[list[int]], params: Params) -> list[Response]:
    """Samples from a trained policy alone."""
    return mixture([policy], [1.0], prompts, params)


def trainer_of(
    base: str | Path,
    pairs: list[Pair],
    output: Path,
    *,
    beta: float,
    micro_batch: int,
    epochs: float,
    batch: int = BATCH,
    **options: Any,
) -> Any:
    """TRL's DPOTrainer over a fresh LoRA; its reference is the model with the LoRA switched off."""
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    arguments = training_arguments(output, micro_batch, epochs, batch) | {"beta": beta, "max_length": 512} | options
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False),
        args=DPOConfig(**arguments),
        processing_class=tokenizer,
        train_dataset=dataset(pairs, tokenizer),
        peft_config=lora("CAUSAL_LM"),
    )


def train(base: str | Path, pairs: list[Pair], output: Path, *, beta: float = 0.1, **options: Any) -> Any:
    """Writes the adapter into `output`, with the base's tokenizer, and returns TRL's trainer, done."""
    options = {"micro_batch": 4, "epochs": 1.0} | options
    trainer = trainer_of(base, pairs, output, beta=beta, **options)
    trainer.train()
    trainer.model.save_pretrained(str(output))
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(str(output))
    return trainer


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--beta", type=float, default=0.1, help="default: 0.1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training, held_out = split(args.pairs, args.holdout_every)
    training, held_out = chosen_pairs(training, args.max_pairs), held_out[: args.held_out_pairs]
    start = time.perf_counter()
    schedule = {
        "beta": args.beta,
        "micro_batch": args.micro_batch,
        "batch": args.batch,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "bf16": args.bf16,
    }
    trainer = train(args.base, training, args.output, **schedule)
    seconds = time.perf_counter() - start
    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
    report = {"pairs": len(training), **schedule, "seconds": seconds, "held_out_pairs": len(held_out)}
    with torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=args.bf16):
        report["held_out"] = rankings(trainer.model.eval(), tokenizer, held_out)
    report["history"] = list(trainer.state.log_history)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    found = ", ".join(f"{name} {each['accuracy']:.3f}" for name, each in report["held_out"].items())
    print(f"{args.output}: {len(training)} pairs in {seconds:.0f} s; right of {len(held_out)} held out by {found}")


if __name__ == "__main__":
    main()
