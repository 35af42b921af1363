"""The demo from end to end on tiny models, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genarm_fast import GenARM
from genarm_fast.demo import show


@pytest.fixture(autouse=True)
def tiny_demo(model: GenARM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "base", lambda: tmp_path)
    monkeypatch.setattr(show, "arm", lambda name: tmp_path / name)
    monkeypatch.setattr(GenARM, "from_pretrained", lambda *args, **kwargs: model)


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show.main(["--quick", "--prompt", "the cat", "--prompt", "a man", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    for part in ("the cat", "a man", "guided by positive", "weak-to-strong", "tokens per second", "mean ± standard"):
        assert part in out
    assert (tmp_path / "out" / "sweep.png").exists()
    assert "sweep.png" in out.replace("\n", "")
    assert "loading the base and three ARMs" in err
    assert "\x1b" not in out + err


def test_json_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--quick", "--json", "--prompt", "the cat", "--out", str(tmp_path)]
    results: list[dict[str, Any]] = []
    for seed in ("0", "0", "1"):
        assert show.main([*args, "--seed", seed]) == 0
        results.append(json.loads(capsys.readouterr().out))
    texts = [[answer["text"] for run in r["runs"] for answer in run["answers"]] for r in results]
    assert texts[0] == texts[1] != texts[2]
    assert [run["arm"] for run in results[0]["runs"]] == [None, "positive", "small"]
    assert len(results[0]["sweep"]["points"]) == 4


def test_record(tmp_path: Path) -> None:
    assert show.main(["--quick", "--record", str(tmp_path / "img")]) == 0
    assert sorted(path.name for path in (tmp_path / "img").iterdir()) == ["demo.svg", "sweep.png"]
    assert "<svg" in (tmp_path / "img" / "demo.svg").read_text()


def test_unknown_option() -> None:
    with pytest.raises(SystemExit, match="2"):
        show.main(["--fast"])
