"""Reinforcement learning through TRL: GRPO trains the base against the trajectory reward model.

    PYTHONPATH=benchmarks python benchmarks/baselines/rewarded.py BASE PAIRS REWARD OUTPUT
        [--max-prompts N] [--beta 0.04]

The prompts are those of the training pairs. The policy maximises E r(x, y) − β KL(π ‖ base). The optimum of that
objective is π_base exp(r / β) / Z, which guided decoding aims at without training the base. The policy decodes by
`dpo.plain`, like any other model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.pairs import LEARNING_RATE, lora, render, split, training_arguments
from baselines.trajectory_reward import TrajectoryReward

Reward = Callable[[list[list[int]]], torch.Tensor]  # maps n whole token sequences to their rewards [n]


def train(
    base: str | Path,
    prompts: Sequence[str],
    reward: Reward,
    output: Path,
    *,
    beta: float = 0.04,
    group: int = 4,
    max_new_tokens: int = 48,
    epochs: float = 1.0,
    **options: Any,
) -> list[dict]:
    """Train a policy, write the adapter into `output`, and return TRL's log.

    group: how many samples a prompt gets. A sample's reward counts relative to the mean of its group.
    options: more arguments of TRL's GRPOConfig.
    """
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)

    def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
        return reward([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]).tolist()

    arguments = training_arguments(output, group, epochs) | {
        "beta": beta,
        "num_generations": group,
        "max_completion_length": max_new_tokens,
        "temperature": 1.0,
    }
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False),
        reward_funcs=rewards,
        args=GRPOConfig(**arguments | options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=lora("CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(str(output))
    tokenizer.save_pretrained(str(output))
    return list(trainer.state.log_history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="model folder or hub id")
    parser.add_argument("pairs", type=Path, help="preference pairs, whose prompts are taken")
    parser.add_argument("reward", type=Path, help="folder that trajectory_reward.py wrote")
    parser.add_argument("output", type=Path, help="folder for the adapter")
    parser.add_argument("--max-prompts", type=int, help="the first so many training prompts (default: all)")
    parser.add_argument("--holdout-every", type=int, default=10, help="as in the other trainings (default: 10)")
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE:g}")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16; weights stay in float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
    prompts = [render(tokenizer, pair.prompt) for pair in split(args.pairs, args.holdout_every)[0]][: args.max_prompts]
    start = time.perf_counter()
    reward = TrajectoryReward.from_pretrained(args.base, args.reward)
    schedule = {name: getattr(args, name) for name in ("beta", "max_new_tokens", "learning_rate", "bf16")}
    history = train(args.base, prompts, reward, args.output, **schedule)
    report = {"prompts": len(prompts), **schedule, "seconds": time.perf_counter() - start, "history": history}
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.output}: {len(prompts)} prompts in {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
