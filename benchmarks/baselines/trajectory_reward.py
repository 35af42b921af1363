"""Trains the trajectory reward model of best-of-N, ARGS and Transfer-Q: one number for a prompt and a response.

    PYTHONPATH=benchmarks python benchmarks/baselines/trajectory_reward.py BASE PAIRS OUTPUT
        [--max-pairs N] [--layers N]

TRL's RewardTrainer minimises the Bradley-Terry loss −log σ(r(x, y_w) − r(x, y_l)). The pairs, the base, the LoRA and
its schedule are those of the ARMs. r is a linear head on the hidden state of the response's last token, EOS not
counted. So r also gives a reward to the beginning of a response. ARGS asks for such rewards, but this training never
shows them. `--layers` keeps the first layers only, which makes training cheaper, and also ARGS and Transfer-Q.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from baselines.interface import reward_member
from baselines.pairs import BATCH, chosen_pairs, command_line, dataset, lora, render, split, training_arguments
from genarm_fast.train.data import Pair


class TrajectoryReward(nn.Module):
    """A decoder with a linear head, which gives the reward of a token sequence at its last token."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.decoder, self.head = classifier.base_model, classifier.score
        self.config = classifier.config

    @classmethod
    def from_pretrained(cls, base: str | Path, adapter: str | Path) -> TrajectoryReward:
        """Load the adapter that `train` wrote, merged into its base, in float32."""
        from peft import PeftModel

        bare = classifier_of(base, json.loads((Path(adapter) / "report.json").read_text())["layers"])
        return cls(PeftModel.from_pretrained(bare, str(adapter)).merge_and_unload().eval())

    @torch.inference_mode()
    def forward(self, sequences: list[list[int]], batch: int = 16) -> Tensor:
        """Return the rewards [n] of n whole token sequences, each a prompt with its response.

        The tokens that all rows of a batch begin with are read once, so rows of one prompt should be neighbours."""
        asked = reward_member("reward", self)
        return torch.cat([asked.start(sequences[i : i + batch]).last for i in range(0, len(sequences), batch)])


def classifier_of(base: str | Path, layers: int | None) -> Any:
    """Return the base's decoder, or its first `layers` layers, under a new head with one output; float32."""
    torch.manual_seed(0)  # the new head is drawn at random
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, trust_remote_code=False
    )
    if layers is not None:
        most = model.config.num_hidden_layers
        if not 1 <= layers <= most:
            raise ValueError(f"layers={layers}: expected 1 to {most}")
        model.base_model.layers = model.base_model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def accuracy(model: TrajectoryReward, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> tuple[float, float]:
    """Return the share of pairs whose chosen response has the higher reward, and its standard error. Ties count ½."""

    def tokens(pair: Pair, side: str) -> list[int]:
        return tokenizer(render(tokenizer, pair.prompt) + side.strip(), add_special_tokens=False)["input_ids"]

    rewards = model([tokens(p, str(side)) for p in pairs for side in (p.chosen, p.rejected)]).view(-1, 2)
    right = ((rewards[:, 0] > rewards[:, 1]).double() + (rewards[:, 0] == rewards[:, 1]).double() / 2).mean().item()
    return right, (right * (1 - right) / len(pairs)) ** 0.5


def train(
    base: str | Path,
    pairs: list[Pair],
    output: Path,
    *,
    layers: int | None = None,
    epochs: float = 1.0,
    micro_batch: int = 4,
    batch: int = BATCH,
    **options: Any,
) -> TrajectoryReward:
    """Train a reward model, write the adapter into `output`, and return the merged model.

    options: more arguments of TRL's RewardConfig.
    """
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.eos_token  # makes the head read the token before the EOS that TRL appends
    trainer = RewardTrainer(
        model=classifier_of(base, layers),
        args=RewardConfig(**training_arguments(output, micro_batch, epochs, batch) | {"max_length": 512} | options),
        processing_class=tokenizer,
        train_dataset=dataset(pairs, tokenizer),
        peft_config=lora("SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    trainer.model.save_pretrained(str(output))
    (output / "report.json").write_text(json.dumps({"layers": layers, "pairs": len(pairs)}) + "\n")
    return TrajectoryReward(trainer.model.merge_and_unload().eval())


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--layers", type=int, help="train and keep the first so many layers (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training, held_out = split(args.pairs, args.holdout_every)
    training, held_out = chosen_pairs(training, args.max_pairs), held_out[: args.held_out_pairs]
    start = time.perf_counter()
    schedule = {
        "micro_batch": args.micro_batch,
        "batch": args.batch,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "bf16": args.bf16,
    }
    model = train(args.base, training, args.output, layers=args.layers, **schedule)
    seconds = time.perf_counter() - start
    share, error = accuracy(model, AutoTokenizer.from_pretrained(args.base, trust_remote_code=False), held_out)
    report = {
        "layers": args.layers,
        "pairs": len(training),
        "held_out_pairs": len(held_out),
        "accuracy": share,
        "standard_error": error,
    }
    (args.output / "report.json").write_text(json.dumps(report | {"seconds": seconds}, indent=1) + "\n")
    print(f"{args.output}: held-out accuracy {share:.3f} ± {1.96 * error:.3f} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
