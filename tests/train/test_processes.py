"""Two processes train as one does: the same steps, report and weights, even if both are killed on the way."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_pairs import toy_rows

from genarm_fast.train import TrainConfig, processes, train
from genarm_fast.train.batches import NO_PAIR, NO_PAIR_INDEX, Collator, PairBatches
from genarm_fast.train.encode import Encoded

Config = Callable[..., TrainConfig]
OPTIONS = {"epochs": 3, "lora_dropout": 0.2, "checkpoint_every": 4, "micro_batch_size": 2, "eval_every": 5}
KILLED = """
import json, os, signal, sys
from genarm_fast.train import TrainConfig, processes, train, run, trainer
from genarm_fast.train.folder import RunFolder
from genarm_fast.train.progress import Narrator

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

def writes(*args):
    raise SystemExit("the second process writes")

processes.connect()
try:  # what the first one raises, both raise
    processes.from_first(lambda: {}[processes.rank()])
    raise SystemExit("nothing was raised")
except KeyError as error:
    assert error.args == (0,)
if processes.rank():
    trainer.write_json = trainer.seal = RunFolder.save = run.save_artifacts = writes
Narrator.on_step_end = on_step_end
options = json.loads(sys.argv[1])
lists = {name: tuple(options[name]) for name in ("lora_targets", "columns", "report_to")}
train(TrainConfig(**{**options, **lists}), progress=False)
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def compared(report: Any) -> Any:
    """Return the report without what depends on the clock, the number of processes, or the step it continued from."""
    if isinstance(report, list):
        return [compared(each) for each in report]
    if not isinstance(report, dict):
        return report
    other = ("seconds", "tokens_per_second", "pairs_per_second", "continued_from_step", "output", "processes")
    return {name: compared(value) for name, value in report.items() if name not in other}


def assert_close(found: Any, expected: Any, path: str = "report") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for name in expected:
            assert_close(found[name], expected[name], f"{path}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for at, (one, other) in enumerate(zip(found, expected)):
            assert_close(one, other, f"{path}[{at}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), path
    else:
        assert found == expected, path


def test_two_processes_are_as_one_through_a_kill(make_config: Config, toy: Path, tmp_path: Path) -> None:
    """The run has 36 pairs in 18 micro-batches per epoch, 54 in all, so the last step is half a step. Dropout is on."""
    config = make_config(toy, **OPTIONS, output=str(tmp_path / "two"), save_dtype="float32")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "killed.py").write_text(KILLED)
    killed = subprocess.run(
        [*launch, str(tmp_path / "killed.py"), json.dumps(dataclasses.asdict(config))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode != 0
    assert "Signal 9" in killed.stderr, killed.stderr
    assert "the second process writes" not in killed.stderr
    assert (config.folder / "checkpoints" / "checkpoint-8" / "complete.json").is_file()
    assert not (config.folder / "report.json").exists()

    defaults = {f.name: f.default for f in fields(TrainConfig)}
    options: list[str] = []
    for name, value in dataclasses.asdict(config).items():
        if name not in ("base", "data") and value != defaults[name]:
            options += [f"--{name.replace('_', '-')}", str(value)]
    # accelerate's launcher of several processes, for any kind of device.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "genarm_fast"]
    ended = subprocess.run(
        [*launch, "train", config.base, config.data, *options, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads((config.folder / "report.json").read_text())
    assert ended.stdout.count('"train_sha256"') == 1, "one process speaks for both"
    assert (report["processes"], report["continued_from_step"]) == (2, 8)

    alone = train(dataclasses.replace(config, output=str(tmp_path / "one")), progress=False)
    assert alone.report["steps"] == 14
    assert {path.name for path in config.folder.iterdir()} == {path.name for path in alone.folder.iterdir()}
    assert_close(compared(report), compared(alone.report))
    one, two = weights(alone.folder), weights(config.folder)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    # The comparison notices a changed dropout rate, a smaller change than another batch.
    other = train(make_config(toy, **OPTIONS | {"lora_dropout": 0.1}, output=str(tmp_path / "other")), progress=False)
    assert any(not torch.allclose(weights(other.folder)[name].float(), one[name], atol=1e-3) for name in one)


UNEVEN = """
import json, sys
from pathlib import Path
from genarm_fast.train import TrainConfig, train

for options in json.loads(Path(sys.argv[1]).read_text()):
    lists = {name: tuple(options[name]) for name in ("lora_targets", "columns", "report_to")}
    train(TrainConfig(**{**options, **lists}), progress=False)
"""
# Pairs, held-out pairs, pairs per forward, pairs per step, epochs.
SHARES = {
    "a micro-batch that is not full, a step that is not full": (37, 5, 2, 8, 1),
    "one pair": (1, 1, 1, 2, 1),
    "one pair, again and again": (1, 0, 1, 2, 3),
    "fewer pairs than a step": (3, 3, 2, 8, 1),
    "fewer pairs than a micro-batch": (3, 1, 4, 8, 2),
    "a micro-batch for each step and process": (5, 2, 1, 2, 2.4),
    "one more than a step": (9, 0, 1, 8, 1),
}


def test_shares_that_differ(make_config: Config, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever is left over, two processes take the same steps as one and write the same report and weights."""
    configs = []
    for number, (pairs, held_out, micro, batch, epochs) in enumerate(SHARES.values()):
        data = write_jsonl(toy_rows(pairs, seed=number), f"data{number}.jsonl")
        options: dict[str, Any] = {"holdout_every": None, "holdout_fraction": 0.0, "eval_every": 2}
        if held_out:
            options["eval_data"] = str(write_jsonl(toy_rows(held_out, seed=99), f"held{number}.jsonl"))
        options |= {"micro_batch_size": micro, "batch_size": batch, "epochs": epochs, "lora_dropout": 0.2}
        options |= {"save_dtype": "float32", "checkpoint_every": 1, "warmup": 0}
        configs.append(make_config(data, **options, output=str(tmp_path / f"two{number}")))
    (tmp_path / "uneven.py").write_text(UNEVEN)
    (tmp_path / "configs.json").write_text(json.dumps([dataclasses.asdict(config) for config in configs]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(tmp_path / "uneven.py"), str(tmp_path / "configs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    for number, (config, (name, (pairs, _, _, batch, epochs))) in enumerate(zip(configs, SHARES.items())):
        report = json.loads((config.folder / "report.json").read_text())
        alone = train(dataclasses.replace(config, output=str(tmp_path / f"one{number}")), progress=False)
        assert report["processes"] == 2
        assert_close(compared(report), compared(alone.report), name)
        if pairs % config.micro_batch_size == 0:
            assert report["steps"] == math.ceil(pairs * epochs / batch), name
        one, two = weights(alone.folder), weights(config.folder)
        assert any(value.any() for key, value in one.items() if "lora_B" in key), f"{name}: nothing was trained"
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairs", [36, 37, 1])
def test_micro_batches_are_shared_out(pairs: int) -> None:
    """Each micro-batch goes to one process, in turn, and all processes get equally many."""
    options = {"size": 2, "epochs": 1.5, "seed": 3}
    whole = PairBatches([5] * pairs, **options).batches
    shares = [PairBatches([5] * pairs, **options, rank=rank, processes=3).batches for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    together = [batch for turn in zip(*shares) for batch in turn]
    assert together[: len(whole)] == whole
    assert together[len(whole) :] == [[NO_PAIR_INDEX]] * (-len(whole) % 3)


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_a_share_of_nothing_counts_nothing(layout: Any) -> None:
    assert Collator(layout, 0)([NO_PAIR])["tokens"].tolist() == [0]
    batch = Collator(layout, 0)([Encoded(0, [3], [4, 1], [5, 1], margin=0.5)])
    assert (batch["tokens"].tolist(), batch["margins"].tolist()) == ([5], [0.5])


def test_what_cannot_be_shared_is_refused(make_config: Config, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"batch_size=4: expected a multiple of 8: micro_batch_size=4 times 2 proc"):
        train(make_config(toy, batch_size=4), progress=False)


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_shards_weights_is_refused_by_name(
    make_config: Config, toy: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{way}=true: expected plain data parallelism: .* all weights"):
        train(make_config(toy), progress=False)
    assert not (toy.parent / "arm").exists()


SHARDED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from genarm_fast.train import TrainConfig
from genarm_fast.train.batches import rows
from genarm_fast.train.encode import Encoded
from genarm_fast.train.metrics import pair_losses
from genarm_fast.train.model import PairModel, add_lora, load_base

distributed.init_process_group("gloo")
for method, dtype in (("full", torch.float32), ("lora", torch.float32), ("lora", torch.bfloat16)):
    config = TrainConfig(base=sys.argv[1], data="-", output="-", method=method, lora_dropout=0.0)
    losses, gradients = [], []
    for sharded in (False, True):
        lm = load_base(config, dtype)
        if method == "lora":
            lm = add_lora(lm, config)
            torch.manual_seed(1)
            for name, parameter in lm.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        model = PairModel(lm)
        if sharded:
            for layer in model.causal.model.layers:
                fully_shard(layer)
            fully_shard(model)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        batch = rows([Encoded(i, [3 + i, 4, 5], [6, 7, 1], [8, 9 + i, 10, 1]) for i in range(2)], 0)
        loss = pair_losses(model(**batch), 0.05, torch.zeros(2)).mean()
        loss.backward()
        losses.append(loss.item())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({name: g.full_tensor() if sharded else g for name, g in found.items()})
    assert losses[0] == losses[1], losses
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    try:  # checkpoints are written in the same way
        save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, sys.argv[2])
    except RuntimeError:
        print(f"{method} {dtype} as alone, and no file of shards")
distributed.destroy_process_group()
"""


def test_what_shards_could_and_could_not_do(base: Path, tmp_path: Path) -> None:
    """PyTorch's FSDP2 gives the loss and gradients of one process. What is missing is a checkpoint of shards."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(tmp_path / "sharded.py"), str(base), str(tmp_path / "shards")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("as alone, and no file of shards") == 6, ended.stdout


def test_alone_nothing_is_sent() -> None:
    assert (processes.count(), processes.rank(), processes.all_gather([1, 2])) == (1, 0, [1, 2])
    assert processes.from_first(lambda: 3) == 3
