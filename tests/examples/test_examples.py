"""Each script of examples/ runs unchanged, with tiny models, and is short enough to copy from."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny_models import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 40  # lines of code, without docstring and blank lines


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "arm", "other")):
        build_model("llama", seed, max_position_embeddings=512).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def run(folders, tmp_path, monkeypatch, capsys):
    """run("name.py", ...): runs the script and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def start(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, "--base", str(folders / "base"), *argv])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_first_text(run, folders):
    out = run("first_text.py", "--arm", str(folders / "arm"), "--max-new-tokens", "6")
    assert out.count("reward -") == 2


def test_weak_to_strong(run, folders):
    out = run("weak_to_strong.py", "--arm", str(folders / "arm"), "--max-new-tokens", "8")
    assert "speculation=off: 8 tokens in 8 steps" in out
    assert "speculation=auto: 8 tokens in" in out


def test_two_arms(run, folders, tmp_path):
    arms = [str(folders / name) for name in ("arm", "other")]
    out = run("two_arms.py", "--arms", *arms, "--seeds", "2", "--max-new-tokens", "4")
    assert out.count("reward a token of a") == 5
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_steer_stream(run, folders):
    out = run("steer_stream.py", "--arm", str(folders / "arm"), "--max-new-tokens", "14")
    assert str([2.0] * 10 + [-2.0] * 4) in out


def test_drop_in(run, folders):
    out = run("drop_in.py", "--arm", str(folders / "arm"), "--max-new-tokens", "5")
    assert out.count("The film was") == 2


def test_train_then_use(run, tmp_path):
    out = run("train_then_use.py", "--pairs", "40", "--max-new-tokens", "5")
    assert "accuracy on held-out pairs:" in out
    assert (tmp_path / "arms" / "cheerful" / "report.json").is_file()
    assert "weight 1.0: " in out


def test_train_on_dataset(run, tmp_path):
    out = run("train_on_dataset.py", "--pairs", "24")
    assert "accuracy on held-out pairs: " in out
    report = json.loads((tmp_path / "arms" / "of-rows" / "report.json").read_text())
    assert (report["config"]["data"], report["data"]["format"]) == ("films", "messages")
    assert report["data"]["train_pairs_with_margin"] == report["data"]["train_pairs"] == 18


def test_harness(run, folders, monkeypatch):
    """This test needs an environment with lm-eval; docs/drop_in.md says when it was last run."""
    pytest.importorskip("lm_eval", reason="lm-eval is not in the development environment: see docs/drop_in.md")
    monkeypatch.chdir(EXAMPLES.parent)  # the task's YAML finds its data from there
    out = run("harness.py", "--arm", str(folders / "arm"), "--limit", "2")
    assert [line.split(":")[0] for line in out.splitlines() if "mood" in line] == [
        "base",
        "guided, weight 1",
        "guided, weight 2",
    ]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_script_is_short_and_says_what_it_takes(path):
    lines = [line for line in path.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES
    assert f"python examples/{path.name}" in path.read_text()
    tests = [Path(__file__), Path(__file__).with_name("test_serve_example.py")]
    assert any(f"def test_{path.stem}(" in file.read_text() or path.name in file.read_text() for file in tests)
