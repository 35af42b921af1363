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
from baselines.mixture import mixture
from baselines.pairs import BATCH, chosen_pairs, dataset, lora, parse, split, training_arguments
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


def train(base: str | Path, pairs: list[Pair], output: Path, *, beta: float = 0.1, **options: Any) -> list[dict]:
    """Writes the adapter into `output`, with the base's tokenizer, and returns TRL's log."""
    options = {"micro_batch": 4, "epochs": 1.0} | options
    trainer = trainer_of(base, pairs, output, beta=beta, **options)
    trainer.train()
    trainer.model.save_pretrained(str(output))
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(str(output))
    return list(trainer.state.log_history)


def main() -> None:
    args = parse(__doc__)
    torch.set_num_threads(args.threads)
    training = chosen_pairs(split(args.pairs, args.holdout_every)[0], args.max_pairs)
    start = time.perf_counter()
    schedule = {
        "micro_batch": args.micro_batch,
        "batch": args.batch,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
    }
    history = train(args.base, training, args.output, **schedule)
    seconds = time.perf_counter() - start
    (args.output / "report.json").write_text(
        json.dumps({"pairs": len(training), "beta": 0.1, **schedule, "seconds": seconds, "history": history}, indent=1)
        + "\n"
    )
    print(f"{args.output}: {len(training)} pairs in {seconds:.0f} s")


if __name__ == "__main__":
    main()
