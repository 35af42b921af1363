"""Direct preference optimisation (DPO) through TRL: trains a policy on the preference pairs that train the ARMs.

    PYTHONPATH=benchmarks python benchmarks/baselines/dpo.py BASE PAIRS OUTPUT [--max-pairs N] [--beta 0.1]

    L = −log σ(β [log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)])

The reference is the base; the LoRA and its schedule are those of the ARMs. An ARM's loss is this loss without π_ref.
The policy decodes like any other model: comparisons use `plain`.
"""

from __future__ import annotations

import argparse
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
    """Return a sample for each prompt from a trained policy alone."""
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
    """Return TRL's DPOTrainer over a fresh LoRA. Its reference is the model with the LoRA switched off."""
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
    """Train a policy, write the adapter and the base's tokenizer into `output`, and return TRL's finished trainer."""
    options = {"micro_batch": 4, "epochs": 1.0} | options
    trainer = trainer_of(base, pairs, output, beta=beta, **options)
    trainer.train()
    trainer.model.save_pretrained(str(output))
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(str(output))
    return trainer


def beta_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beta", type=float, default=0.1, help="default: 0.1")


def trained(args: argparse.Namespace, training: list[Pair], held_out: dict[str, list[Pair]], **about: Any) -> None:
    """Train with the options of the command line, rank each held-out set, and write report.json beside the adapter.

    about: more fields of the report."""
    start = time.perf_counter()
    names = ("beta", "micro_batch", "batch", "epochs", "learning_rate", "bf16")
    schedule = {name: getattr(args, name) for name in names}
    trainer = train(args.base, training, args.output, **schedule)
    seconds = time.perf_counter() - start
    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
    report = {"pairs": len(training), **about, **schedule, "seconds": seconds}
    report["held_out_pairs"] = sum(map(len, held_out.values()))
    with torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=args.bf16):
        report |= {name: rankings(trainer.model.eval(), tokenizer, pairs) for name, pairs in held_out.items()}
    report["history"] = list(trainer.state.log_history)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.output}: {len(training)} pairs in {seconds:.0f} s")
    for name, pairs in held_out.items():
        found = ", ".join(f"{by} {each['accuracy']:.3f}" for by, each in report[name].items())
        print(f"{name.replace('_', ' ')}, right of {len(pairs)} pairs by {found}")


def main() -> None:
    parser = command_line(__doc__)
    beta_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training, held_out = split(args.pairs, args.holdout_every)
    trained(args, chosen_pairs(training, args.max_pairs), {"held_out": held_out[: args.held_out_pairs]})


if __name__ == "__main__":
    main()
