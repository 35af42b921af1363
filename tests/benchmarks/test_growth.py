"""The benchmark of growth: it measures each point asked for once, and continues where it was stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import build_model, build_tokenizer, save_adapter


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("growth")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_model("llama", 0).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), base=tmp_path / "base", seed=seed)
    return tmp_path


def test_a_run_goes_on_where_it_was(growth, folder, monkeypatch, capsys):
    command = [str(folder / "base"), "--lora", str(folder / "1"), str(folder / "2"), "--steps", "2", "--turns", "2"]
    command += ["--rows", "1", "3", "--contexts", "30", "--arms", "0", "2", "--prompts", "20", "--arm-rows", "2"]
    command += ["--json", str(folder / "growth.json"), "--plot", str(folder / "growth.png")]
    asked = []
    add = growth.Figures.add

    def stopped(self, way, axis, value, milliseconds):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append((way, axis, value))
        assert milliseconds > 0
        add(self, way, axis, value, milliseconds)

    monkeypatch.setattr(growth.Figures, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        growth.main(command)
    first = json.loads((folder / "growth.json").read_text())["ms"]
    monkeypatch.setattr(growth.Figures, "add", lambda self, *point: asked.append(point[:3]) or add(self, *point))
    growth.main(command)
    found = json.loads((folder / "growth.json").read_text())["ms"]
    points = [("rows", 1), ("rows", 3), ("contexts", 30), ("prompts", 20)]
    wanted = [(way, *point) for way in ("bfloat16", "exact", "hf") for point in points]
    wanted += [(way, "arms", count) for way in ("bfloat16", "exact") for count in (0, 2)] + [("hf", "arms", 0)]
    assert sorted(asked) == sorted(2 * wanted)
    assert found["bfloat16"]["rows"]["1"][0] == first["bfloat16"]["rows"]["1"][0]
    assert (folder / "growth.png").stat().st_size > 1000
    assert "| CPU ms, rows of a step | 1 | 3 |" in capsys.readouterr().out
    del asked[:]
    growth.main(command)
    assert not asked
    with pytest.raises(SystemExit, match="measured otherwise"):
        growth.main([*command, "--steps", "3"])


def test_arms_that_are_weighed_take_part(growth, folder, monkeypatch):
    """As many ARMs take part as the axis says: a step has the logits of that many lanes."""
    ours = growth.Ours(str(folder / "base"), "bfloat16", [folder / "1", folder / "2"], 4)
    stream, weights = ours.model.stream, []

    def seen(prompts, params):
        weights.append(params.weights)
        return stream(prompts, params)

    monkeypatch.setattr(ours.model, "stream", seen)
    for count in (0, 1, 2):
        ours.step([[5, 9, 33]] * 2, count, 2)
    assert [sum(each.values()) for each in weights] == [0, 1, 2]


def test_a_prompt_is_the_base_s_alone(growth, folder, monkeypatch):
    """ "hf" reads the base's prompt alone too: an ARM would have its own prompt to read."""
    ours = growth.Ours(folder / "base", "bfloat16", [folder / "1", folder / "2"], 1)
    weights, generate = [], ours.model.generate
    monkeypatch.setattr(
        ours.model,
        "generate",
        lambda *given, **options: weights.append(options["weights"]) or generate(*given, **options),
    )
    assert ours.prompt([1, 2, 3]) > 0
    assert weights == [{"arm0": 0.0, "arm1": 0.0}]
