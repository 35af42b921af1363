"""Runs that are killed and started again."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_pairs import toy_rows

from genarm_fast.train import TrainConfig, train
from genarm_fast.train import run as run_module
from genarm_fast.train.checkpoints import checkpoints, last_checkpoint
from genarm_fast.train.files import locked
from genarm_fast.train.model import load_base
from genarm_fast.train.progress import Narrator

Config = Callable[..., TrainConfig]
KillAt = Callable[[int | None], None]
LONG = {"epochs": 3, "lora_dropout": 0.2, "checkpoint_every": 4, "save_dtype": "float32", "micro_batch_size": 2}
SCRIPT = """
import json, os, signal, sys, torch
from genarm_fast.train import TrainConfig, train
from genarm_fast.train.files import locked
from genarm_fast.train.progress import Narrator

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
Narrator.on_step_end = on_step_end
options = json.loads(sys.argv[1])
lists = {name: tuple(options[name]) for name in ("lora_targets", "columns", "report_to")}
train(TrainConfig(**{**options, **lists}), progress=False)
"""


class Killed(BaseException):
    """An exception that stands for a kill where a real one would cost a process."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> KillAt:
    """kill_at(step): makes runs die after that step; kill_at(None): lets them live."""
    plain = Narrator.on_step_end

    def set_step(step: int | None) -> None:
        def on_step_end(self: Narrator, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            plain(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise Killed

        monkeypatch.setattr(Narrator, "on_step_end", on_step_end)

    return set_step


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same(one: str | Path, other: str | Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert any(value.abs().max() > 1e-3 for name, value in first.items() if "lora_B" in name)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_kill_minus_nine(make_config: Config, toy: Path, tmp_path: Path) -> None:
    """A run killed by SIGKILL continues from its last checkpoint and ends with the weights of an undisturbed run."""
    config = make_config(toy, **LONG)
    process = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(config))])
    assert process.returncode == -signal.SIGKILL
    assert not (Path(config.output) / "report.json").exists()
    resumed = train(config, progress=False)
    assert resumed.report["continued_from_step"] == 8
    alone = train(make_config(toy, **LONG, output=str(tmp_path / "alone")), progress=False)
    assert alone.report["continued_from_step"] == 0
    assert_same(config.output, alone.folder)
    assert resumed.report["final"] == alone.report["final"]
    assert resumed.report["before"] == alone.report["before"]
    assert untimed(resumed.report) == untimed(alone.report)


def untimed(report: Any) -> Any:
    """Return a report without what depends on the clock or the step it continued from."""
    if isinstance(report, list):
        return [untimed(each) for each in report]
    if not isinstance(report, dict):
        return report
    timed = ("seconds", "tokens_per_second", "pairs_per_second", "continued_from_step", "output")
    return {name: untimed(value) for name, value in report.items() if name not in timed}


def test_the_report_is_that_of_a_run_left_alone(
    make_config: Config, toy: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    """The report also matches for a log interval that spans the checkpoint."""
    options = {**LONG, "log_every": 3}
    kill_at(11)
    with pytest.raises(Killed):
        train(make_config(toy, **options), progress=False)
    kill_at(None)
    resumed = train(make_config(toy, **options), progress=False)
    alone = train(make_config(toy, **options, output=str(tmp_path / "alone")), progress=False)
    assert resumed.report["continued_from_step"] == 8
    assert untimed(resumed.report) == untimed(alone.report)
    assert any(entry.get("train_accuracy") is not None for entry in alone.report["history"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_loses_no_more_than_the_last_interval(
    make_config: Config, toy: Path, tmp_path: Path, kill_at: KillAt, method: str
) -> None:
    """This holds even if the evaluations, which draw no random numbers, come at other steps afterwards."""
    options = {**LONG, "method": method, "epochs": 2}
    kill_at(7)
    with pytest.raises(Killed):
        train(make_config(toy, **options), progress=False)
    kill_at(None)
    resumed = train(make_config(toy, **options, eval_every=2, eval_pairs=3), progress=False)
    assert resumed.report["continued_from_step"] == 4
    alone = train(make_config(toy, **options, output=str(tmp_path / "alone")), progress=False)
    if method == "lora":
        assert_same(resumed.folder, alone.folder)
    assert resumed.report["final"] == alone.report["final"]


def test_micro_batches_are_numbered_through_a_kill(
    make_config: Config, toy: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    """With the numbers an auxiliary loss can repeat its random draws."""
    numbers: list[int] = []

    def auxiliary_loss(lm: torch.nn.Module, number: int) -> torch.Tensor:
        numbers.append(number)
        noise = torch.randn(16, generator=torch.Generator().manual_seed(number))
        return sum(p.mean() for p in lm.parameters() if p.requires_grad) * noise.sum()

    kill_at(6)
    with pytest.raises(Killed):
        train(make_config(toy, **LONG), progress=False, auxiliary_loss=auxiliary_loss)
    kill_at(None)
    assert numbers == list(range(24))  # four micro-batches per step
    numbers.clear()
    resumed = train(make_config(toy, **LONG), progress=False, auxiliary_loss=auxiliary_loss)
    assert numbers == list(range(16, 3 * 36 // 2))
    alone = train(
        make_config(toy, **LONG, output=str(tmp_path / "alone")), progress=False, auxiliary_loss=auxiliary_loss
    )
    assert_same(resumed.folder, alone.folder)


def test_a_half_written_checkpoint_is_not_used(make_config: Config, toy: Path, tmp_path: Path, kill_at: KillAt) -> None:
    config = make_config(toy, **LONG)
    kill_at(10)
    with pytest.raises(Killed):
        train(config, progress=False)
    kill_at(None)
    whole = checkpoints(config) / "checkpoint-8"
    half = checkpoints(config) / "checkpoint-9"
    shutil.copytree(whole, half)
    (half / "complete.json").unlink()
    (half / "trained.safetensors").write_bytes(b"cut off")
    assert last_checkpoint(checkpoints(config)) == whole
    assert not half.exists()
    assert train(config, progress=False).report["continued_from_step"] == 8


def test_killed_before_the_first_checkpoint_or_after_the_last_step(
    make_config: Config,
    toy: Path,
    tmp_path: Path,
    kill_at: KillAt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(toy, **LONG)
    kill_at(2)
    with pytest.raises(Killed):
        train(config, progress=False)
    kill_at(None)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("genarm_fast.train.run.save_artifacts", die)
        with pytest.raises(Killed):
            train(config, progress=False)
    resumed = train(config, progress=False)
    assert resumed.report["continued_from_step"] == resumed.report["steps"]
    alone = train(make_config(toy, **LONG, output=str(tmp_path / "alone")), progress=False)
    assert_same(config.output, alone.folder)
    assert untimed(resumed.report["history"]) == untimed(alone.report["history"])


def test_a_finished_run_is_not_repeated(make_config: Config, toy: Path) -> None:
    first = train(make_config(toy), progress=False)
    changed = (first.folder / "adapter_model.safetensors").stat().st_mtime_ns
    again = train(make_config(toy, eval_pairs=7), progress=False)
    assert again.report == first.report
    assert (first.folder / "adapter_model.safetensors").stat().st_mtime_ns == changed
    assert not checkpoints(make_config(toy)).exists()


@pytest.mark.parametrize("change", [{"beta": 0.1}, {"seed": 1}, {"lora_rank": 4}, {"lora_targets": ("q_proj",)}])
def test_other_options_are_refused(make_config: Config, toy: Path, change: dict[str, Any]) -> None:
    train(make_config(toy), progress=False)
    with pytest.raises(ValueError, match=rf"holds a run with other options or data \(changed: {next(iter(change))}"):
        train(make_config(toy, **change), progress=False)


def test_other_data_are_refused_and_moved_data_are_not(
    make_config: Config, toy: Path, write_jsonl: Callable[..., Path]
) -> None:
    first = train(make_config(toy), progress=False)
    moved = toy.rename(toy.with_name("moved.jsonl"))
    assert train(make_config(moved), progress=False).report == first.report
    with pytest.raises(ValueError, match="changed: train_sha256"):
        train(make_config(write_jsonl([*toy_rows(48)[:-1], *toy_rows(1, seed=5)])), progress=False)


def test_another_base_is_refused(make_config: Config, toy: Path, base: Path, tmp_path: Path, kill_at: KillAt) -> None:
    """The other base has the same folder name and tokenizer, but other weights."""
    kill_at(6)
    with pytest.raises(Killed):
        train(make_config(toy, **LONG), progress=False)
    kill_at(None)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = {name: tensor * 1.1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected the weights that the run in .* began with"):
        train(dataclasses.replace(make_config(toy, **LONG), base=str(other)), progress=False)


def test_another_base_of_a_finished_run_is_refused(
    make_config: Config, toy: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report would pass for the other base's. The check loads no weights, and the base may have moved."""
    report = train(make_config(toy), progress=False).report
    monkeypatch.setattr("genarm_fast.train.run._load", lambda *_: pytest.fail("it is loaded"))
    shutil.copytree(base, tmp_path / "moved")
    config = make_config(toy)
    assert train(dataclasses.replace(config, base=str(tmp_path / "moved")), progress=False).report == report
    tensors = {name: tensor * 1.1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected the weights that the run in .* began with"):
        train(dataclasses.replace(config, base=str(tmp_path / "moved")), progress=False)


def test_two_processes_in_one_folder_are_refused(make_config: Config, toy: Path) -> None:
    config = make_config(toy)
    with locked(config.folder), pytest.raises(BlockingIOError, match="another running process trains there"):
        train(config, progress=False)
    train(config, progress=False)


def test_a_run_that_ends_elsewhere_meanwhile_is_not_begun_anew(
    make_config: Config, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and the work in it, no other process may change it."""
    config = make_config(toy)

    def begin_another(*args: Any) -> Any:
        with pytest.raises(BlockingIOError, match="another running process trains there"):
            train(config, progress=False)
        return load_base(*args)

    monkeypatch.setattr("genarm_fast.train.run.load_base", begin_another)
    train(config, progress=False)


def test_a_full_disk_leaves_the_folder_free(make_config: Config, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(toy)

    def half(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[:20].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match=r"No space left on device; the same command resumes: '.*run\.json'"):
            train(config, progress=False)
    assert not config.folder.exists()
    config.folder.mkdir()
    (config.folder / "partial-run.json").write_text("{")  # left by a kill
    train(config, progress=False)
    assert not (config.folder / "partial-run.json").exists()


@pytest.fixture
def most_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """most_bytes(n): once the base is loaded, no file grows beyond n bytes: real writes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    most: list[int | None] = [None]
    plain = run_module.choose_paths

    def limited(*arguments: Any) -> Any:
        if most[0] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most[0], before[1]))
        return plain(*arguments)

    def set_most(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        most[0] = size

    monkeypatch.setattr(run_module, "choose_paths", limited)
    yield set_most
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_file_that_does_not_fit_is_named_and_the_same_command_resumes(
    make_config: Config, toy: Path, tmp_path: Path, most_bytes: Callable[[int | None], None]
) -> None:
    options = {**LONG, "epochs": 1, "checkpoint_every": 2}
    whole = train(make_config(toy, output=str(tmp_path / "whole"), **options), progress=False)
    config = make_config(toy, **options)
    failures: list[str] = []
    size = 0
    while size < 1 << 24:
        most_bytes(size)
        failure = None
        try:
            train(config, progress=False)
        except OSError as error:
            failure = error
        most_bytes(None)
        if failure is None:
            break
        assert str(failure).count("; the same command resumes") == 1, str(failure)
        name = Path(str(failure.filename)).relative_to(config.folder)
        failures.append("/".join(part for part in name.parts if not part.startswith("checkpoint-")))
        size = size * 2 if size else 64
    assert len(failures) > 3
    assert {"run.json", "checkpoints"} <= set(failures), failures
    assert_same(config.folder, whole.folder)
    again = json.loads((config.folder / "report.json").read_text())
    assert again["final"] == whole.report["final"]
    times = {"tokens_per_second", "pairs_per_second"}
    for found, expected in zip(again["history"], whole.report["history"], strict=True):
        assert {n: v for n, v in found.items() if n not in times} == {
            n: v for n, v in expected.items() if n not in times
        }


def test_a_folder_that_is_read_only(make_config: Config, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails before the base is loaded; a finished run may be in a read-only folder."""
    config = make_config(toy)
    first = train(config, progress=False)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != config.folder)
    assert train(config, progress=False).report == first.report
    (config.folder / "report.json").unlink()
    monkeypatch.setattr("genarm_fast.train.run.load_base", lambda *_: pytest.fail("loads"))
    with pytest.raises(PermissionError, match=r"output='.*arm': expected a folder that can be written to"):
        train(config, progress=False)


def test_resume_never_and_foreign_folders(make_config: Config, toy: Path, tmp_path: Path) -> None:
    train(make_config(toy), progress=False)
    with pytest.raises(ValueError, match=r"holds a run: expected another folder with resume='never'"):
        train(make_config(toy, resume="never"), progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder, or one with a run to continue"):
        train(make_config(toy, output=str(tmp_path / "full")), progress=False)


RUN = {"config": 5, "train_sha256": "", "held_out_sha256": ""}


@pytest.mark.parametrize("text", ["", "{", "null", "{}", '{"identity": 5}', json.dumps({"identity": RUN})])
@pytest.mark.parametrize("name", ["run.json", "report.json"])
def test_damaged_files_of_a_run_are_named(make_config: Config, toy: Path, name: str, text: str) -> None:
    train(make_config(toy), progress=False)
    (make_config(toy).folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: expected (the|a) JSON object .*a run wrote"):
        train(make_config(toy), progress=False)


def test_what_is_no_checkpoint_is_left_alone(make_config: Config, toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint-best", "checkpoint-4"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint-9").write_text("a note")
    assert last_checkpoint(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-9", "checkpoint-best"]


@pytest.mark.parametrize("damage", ["lost", "bit", "seal"])
def test_damaged_checkpoints_are_passed_over(
    make_config: Config, toy: Path, tmp_path: Path, kill_at: KillAt, damage: str
) -> None:
    """The run continues from the previous checkpoint to the same weights; without a whole one it is an error."""
    config = make_config(toy, **LONG)
    kill_at(10)
    with pytest.raises(Killed):
        train(config, progress=False)
    kill_at(None)
    older, newer = sorted(checkpoints(config).iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for folder in (newer, older):
        if damage == "lost":
            (folder / "optimizer.pt").unlink()
        elif damage == "seal":
            (folder / "complete.json").write_text("{}")
        else:
            content = bytearray((folder / "trained.safetensors").read_bytes())
            content[-1] ^= 4
            (folder / "trained.safetensors").write_bytes(content)
        if folder == newer:
            with pytest.warns(UserWarning, match=f"{newer.name}: .*: passed over"):
                assert last_checkpoint(checkpoints(config)) == older
            shutil.copytree(config.folder, tmp_path / "other")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(ValueError, match="all are damaged"):
        train(config, progress=False)
    shutil.rmtree(config.folder)
    shutil.move(tmp_path / "other", config.folder)
    with pytest.warns(UserWarning, match="passed over"):
        resumed = train(config, progress=False)
    assert_same(resumed.folder, train(make_config(toy, **LONG, output=str(tmp_path / "alone")), progress=False).folder)
