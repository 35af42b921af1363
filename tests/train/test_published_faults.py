"""Faults of GenARM's published training code: a test for each shows that this code does not have it."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from toy_pairs import toy_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import genarm_fast.train.run as run
from genarm_fast.train import TrainConfig, train
from genarm_fast.train.data import Pair, load_pairs, split_pairs
from genarm_fast.train.encode import Encoder
from genarm_fast.train.trainer import ArmTrainer

Config = Callable[..., TrainConfig]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[ArmTrainer]:
    """The list of trainers that runs make."""
    made: list[ArmTrainer] = []

    class Seen(ArmTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(run, "ArmTrainer", Seen)
    return made


def test_lengths_count_tokens_not_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    """The published code compares len(prompt) + len(chosen) <= 1024 on strings."""
    config = TrainConfig(base="b", data="d", output="o", max_prompt_tokens=40, max_response_tokens=9)
    wordy, letters = "the cat sat on the mat" * 3, "q" * 41  # 66 characters in few tokens, 41 in as many tokens
    encode = Encoder(tokenizer, config)
    assert len(tokenizer(wordy)["input_ids"]) <= 40 < len(wordy)
    kept, dropped = encode([Pair(0, wordy, "cat", "mat"), Pair(1, letters, "cat", "mat")], "pairs")
    assert ([pair.row for pair in kept], dropped) == ([0], {"prompt too long": 1})


def test_lora_targets_exist_in_the_model(make_config: Config, toy: Path, trainers: list[ArmTrainer]) -> None:
    """The published code has GPT-J's names, of which a LLaMA has three."""
    published = ("q_proj", "v_proj", "k_proj", "out_proj", "fc_in", "fc_out", "wte")
    with pytest.raises(ValueError, match="no linear module 'out_proj': expected some of down_proj"):
        train(make_config(toy, lora_targets=published), progress=False)
    train(make_config(toy), progress=False)
    adapted = {name.split(".")[-2] for name, _ in trainers[0].model.named_modules() if name.endswith("lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_on_the_weights_that_are_served(
    make_config: Config, toy: Path, base: Path, trainers: list[ArmTrainer], dtype: str
) -> None:
    """The published code trains against an fp4 base and serves on a bf16 one."""
    result = train(make_config(toy, dtype=dtype, lora_targets=("q_proj",)), progress=False)
    assert result.report["dtype"] == dtype
    served = dict(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).named_parameters())
    compared = 0
    for name, weight in trainers[0].model.causal.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, served[name.replace(".base_layer", "")]), name
            assert weight.dtype == getattr(torch, dtype)
            compared += 1
    assert compared == len(served)


def test_lora_dropout_is_applied(make_config: Config, toy: Path, trainers: list[ArmTrainer]) -> None:
    """In the published code, TRL sets every dropout to 0 after the adapter has been made."""
    train(make_config(toy, lora_dropout=0.5, learning_rate=0.05), progress=False)
    trainer = trainers[0]
    rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.5}
    batch = trainer.data_collator(trainer.held_out[:2])
    del batch["tokens"]
    for mode, same in ((trainer.model.train, False), (trainer.model.eval, True)):
        mode()
        assert torch.equal(trainer.model(**batch), trainer.model(**batch)) is same


def test_every_option_is_read(make_config: Config, toy: Path, write_jsonl: Callable[..., Path]) -> None:
    """The published code never reads `optimizer_type` and other options."""
    read: set[str] = set()
    package = str(Path(run.__file__).parent)

    class Watched(TrainConfig):
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(package) and not caller.endswith("config.py"):
                read.add("output" if name == "folder" else name)
            return super().__getattribute__(name)

    held = write_jsonl(toy_rows(4, seed=9), "held.jsonl")
    options = dataclasses.asdict(make_config(toy))
    other = {"holdout_every": None, "eval_data": str(held)}
    for number, change in enumerate(({"max_prompt_tokens": 5}, {"holdout_every": None}, other)):
        config = Watched(**{**options, **change, "output": f"{options['output']}-{number}"})
        for _ in range(2):
            train(config, progress=False)
    assert {field.name for field in dataclasses.fields(TrainConfig)} - read == set()


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adafactor", None)]
)
def test_the_optimizer_is_the_one_asked_for(
    make_config: Config, toy: Path, trainers: list[ArmTrainer], name: str, kind: type | None
) -> None:
    train(make_config(toy, optimizer=name, weight_decay=0.125, learning_rate=0.03), progress=False)
    optimizer: Any = trainers[0].optimizer.optimizer  # type: ignore[union-attr]
    assert isinstance(optimizer, kind) if kind else type(optimizer).__name__ == "Adafactor"
    assert {group["weight_decay"] for group in optimizer.param_groups} >= {0.125}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.03}


def test_no_response_is_cut_and_each_ends_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """In the published code, responses over the limit lose their end and their EOS, and stay."""
    config = TrainConfig(base="b", data="d", output="o", max_response_tokens=8)
    pairs = [Pair(row, "p", "x" * (row + 1), "y") for row in range(12)]
    kept, dropped = Encoder(tokenizer, config)(pairs, "pairs")
    assert [pair.row for pair in kept] == list(range(7))
    assert dropped == {"response too long": 5}
    assert all(side[-1] == tokenizer.eos_token_id for pair in kept for side in (pair.chosen, pair.rejected))


def test_length_bias_is_reported(make_config: Config, write_jsonl: Callable[..., Path]) -> None:
    """In the published code, a sum of log-probabilities prefers short responses, unseen. Here the rejected one is
    longer."""
    rows = [{**row, "rejected": row["rejected"] + " and the sea" * 4} for row in toy_rows(48)]
    final = train(make_config(write_jsonl(rows)), progress=False).report["final"]
    assert final["tokens_rejected"] > final["tokens_chosen"] + 8
    assert final["length_baseline_accuracy"] == 1.0
    assert "length_margin_correlation" in final


def test_the_split_is_seeded_and_shared(make_config: Config, toy: Path) -> None:
    """The published code draws the split without a seed, and evaluates on other pairs."""
    config = make_config(toy, holdout_every=None, holdout_fraction=0.3, seed=3)
    report = train(config, progress=False).report
    rows = [pair.row for pair in split_pairs(load_pairs(str(toy)).pairs, config)[1]]
    assert report["data"]["held_out_rows"] == rows
    assert 0 < len(rows) < 48


def test_loss_has_no_reference_model_and_no_length_normalisation(
    make_config: Config, toy: Path, base: Path, trainers: list[ArmTrainer]
) -> None:
    """The Trainer's loss of a batch is −log σ(β_r Σ log π(y_w) − β_r Σ log π(y_l)), summed over response tokens with
    EOS."""
    train(make_config(toy, beta=0.3, learning_rate=0.05), progress=False)
    trainer = trainers[0]
    trainer.model.eval()
    pairs = trainer.held_out[:3]
    lm: Any = copy.deepcopy(trainer.model.lm)
    assert isinstance(lm, peft.PeftModel)
    losses = []
    for pair in pairs:
        sums = []
        for response in (pair.chosen, pair.rejected):
            logps = lm(input_ids=torch.tensor([pair.prompt + response])).logits[0].double().log_softmax(-1)
            sums.append(sum(logps[len(pair.prompt) - 1 + t, token] for t, token in enumerate(response)))
        losses.append(-torch.log(torch.sigmoid(0.3 * (sums[0] - sums[1]))))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs), num_items_in_batch=3)
    assert loss.detach().item() == pytest.approx(sum(x.item() for x in losses) / 3, rel=1e-4)
