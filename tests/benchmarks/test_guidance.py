"""The tables of the README and the page have the figures of the newest result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"


@pytest.fixture
def guidance(script):
    return script("guidance")


def reported(ratio):
    """Return a result file in which every figure follows from its place."""
    lines = [("base alone", 1.0), ("1 LoRA ARM, lanes", 0.5), ("1 LoRA ARM, own forward", 9.0)]
    lines += [("base alone, Hugging Face generate", 0.1)]
    figures = [(name, batch, ratio * factor / batch) for name, factor in lines for batch in (1, 8)]
    results = [{"variant": name, "batch": b, "ratio": each, "tokens/s": 2 * each} for name, b, each in figures]
    decode = {"results": results}
    names = ("K = 3", "auto")
    drafts = {"lines": [{"contender": name, "batch": 1, "x base alone, Hugging Face": ratio * 2} for name in names]}
    return decode, drafts


def test_table(guidance):
    found = {"machine": {"date": "2026-11-28", "device": "CPU", "capability": "AVX2", "cores": 2}, "runs": {}}
    found["machine"]["load"], found["rounds"] = 0.5, 3
    for weights, ratio in (("bfloat16", 2.0), ("exact", 4.0)):
        decode, drafts = reported(ratio)
        found["runs"] |= {f"decode, {weights}": decode, f"pair, {weights}": drafts, f"lookup, {weights}": drafts}
    found["runs"]["decode, float32"] = reported(6.0)[0]
    lines = guidance.table(found).splitlines()
    assert "| the same base in float32, Hugging Face | 3.0 | 3.0 |  |  |" in lines
    assert lines[0] == "2026-11-28, 2 cores of an CPU with AVX2, one thread, load 0.5; medians of CPU time, 3 round(s):"
    assert "| base alone, here | 2.0 | 0.25 | 4.0 | 0.5 |" in lines
    assert "| 1 LoRA ARM, in one forward with the base | 1.0 | 0.12 | 2.0 | 0.25 |" in lines
    assert "| 2 LoRA ARMs |  |  |  |  |" in lines
    assert "| 1 small ARM (0.07 of the base's cost), drafting for the base | 4.0 |  | 8.0 |  |" in lines


def test_commands_are_of_the_same_shapes(guidance):
    commands = guidance.commands("base", ["one", "two"], 3)
    assert len(commands) == 7
    assert commands.pop("decode, float32")[-1] == "--json"
    for name, command in commands.items():
        assert command[0] == ("decode.py" if name.startswith("decode") else "speculation.py")
        assert ("--quantization" in command) == name.endswith("exact")
        assert set(guidance.PLAIN) & set(command[command.index("--skip") :]) <= {"1 ARM, naive loop over two models"}


def test_pages_have_the_newest_figures(guidance):
    found = guidance.newest()
    for path, of in ((README, lambda: [found]), (PAGE, lambda: guidance.others(found))):
        page, told = path.read_text(), "\n".join(map(guidance.table, of()))
        assert guidance.fill(page, {guidance.BLOCK: told}) == page
        assert guidance.fill(page, {guidance.BLOCK: told + "another"}) != page


def test_newest_and_others(guidance, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a result file"):
        guidance.newest()
    dates = [("AVX512", "2026-11-29"), ("AVX2", "2026-11-29"), ("AVX512", "2026-11-27"), ("NEON", "2026-11-20")]
    for i, (capability, date) in enumerate(dates):
        told = {"machine": {"capability": capability, "date": date}, "rounds": i}
        (tmp_path / f"guidance-{i}.json").write_text(json.dumps(told))
    assert guidance.newest()["rounds"] == 0
    assert [each["rounds"] for each in guidance.others(guidance.newest())] == [3, 1]


def test_plot(guidance, tmp_path):
    guidance.plot(guidance.newest(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
