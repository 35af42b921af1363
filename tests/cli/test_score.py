"""`genarm-fast score` on tiny models: one response, files of responses, preference pairs."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genarm_fast import ARM, GenARM


@pytest.fixture(scope="module")
def model(models: Any) -> GenARM:
    arms = [ARM(models.arm, weight=1.5, name="one"), ARM(models.base, weight=-0.25, name="two")]
    return GenARM.from_pretrained(models.base, arms)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_response(cli: Callable, models: Any, model: GenARM) -> None:
    expected = model.score([chat("the cat")], ["sat on the mat"])[0]
    result = cli("score", *models.options, "--prompt", "the cat", "--response", "sat on the mat", "--json")
    assert json.loads(result.out) == json.loads(json.dumps(expected.to_dict()))
    text = cli("score", *models.options, "--prompt", "the cat", "--response", "sat on the mat").out
    assert f"{expected.rewards['one'].total:.2f}" in text
    assert all(f"{value:.2f}" in text for value in expected.rewards["two"].tokens)


def test_a_file_of_responses(cli: Callable, models: Any, model: GenARM, tmp_path: Path) -> None:
    rows = [{"prompt": f"the cat {i}", "response": "sat on " * (i % 5 + 1), "id": f"r{i}"} for i in range(70)]
    path = write_lines(tmp_path / "responses.jsonl", rows)
    found = json.loads(cli("score", *models.options, "--input", path, "--json").out)["scores"]
    expected = model.score([chat(row["prompt"]) for row in rows], [row["response"] for row in rows])
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    for row, output in zip(found, expected):
        assert row["rewards"]["one"]["total"] == pytest.approx(output.rewards["one"].total, abs=1e-3)
        assert row["base_logprobs"] == pytest.approx(output.base_logprobs, abs=1e-3)
    rows[69] |= {"id": "[b]r69[/b]", "response": "[red] :cat: [/blue]"}
    table = cli("score", *models.options, "--input", write_lines(path, rows)).out
    assert "[b]r69[/b]" in table
    assert "[red] :cat: [/blue]" in table


def test_a_pipe_is_read_whole(cli: Callable, models: Any, tmp_path: Path) -> None:
    """The first line tells the format. Opened a second time, the pipe would lack the lines read before."""
    rows = [{"prompt": f"the cat {i}", "response": "sat"} for i in range(9)]
    path = write_lines(tmp_path / "responses.jsonl", rows)
    expected = cli("score", *models.options, "--input", path, "--json")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()), daemon=True)
    writer.start()
    found = cli("score", *models.options, "--input", tmp_path / "pipe", "--json")
    assert (found.code, found.out) == (0, expected.out)
    assert len(json.loads(found.out)["scores"]) == 9


def test_pairs_give_accuracy_and_margins(cli: Callable, models: Any, model: GenARM, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f"the cat {i}", "rejected": f"a mat and {i} more"} for i in range(20)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    found = json.loads(cli("score", *models.options, "--input", path, "--json").out)
    sides = [
        model.score([chat(row["prompt"]) for row in rows], [row[side] for row in rows])
        for side in ("chosen", "rejected")
    ]
    margins = [a.rewards["one"].total - b.rewards["one"].total for a, b in zip(*sides)]
    assert found["pairs"] == 20
    assert found["summary"]["one"]["margin_mean"] == pytest.approx(sum(margins) / 20, abs=1e-3)
    assert found["summary"]["one"]["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 20)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = json.loads(cli("score", *models.options, "--input", write_lines(path, swapped), "--json").out)
    assert other["summary"]["one"]["accuracy"] == pytest.approx(1 - found["summary"]["one"]["accuracy"])
    first = found["scores"][0]["chosen"]
    assert first["(weighted sum)"] == pytest.approx(1.5 * first["one"] - 0.25 * first["two"])
    assert first["(base)"] == pytest.approx(first["two"])  # ARM "two" is the base
    table = cli("score", *models.options, "--input", path).out
    assert "20 pairs" in table
    assert "(weighted sum)" in table


def test_transcripts_become_messages_in_a_chat(cli: Callable, models: Any, model: GenARM, tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: the cat?\n\nAssistant:"
    path = write_lines(tmp_path / "hh.jsonl", [{"chosen": start + " sat", "rejected": start + " ran off"}])
    messages = [*chat("hi"), {"role": "assistant", "content": "hello"}, *chat("the cat?")]
    for option, prompt, response in (("--chat", messages, "sat"), ("--raw", start, " sat")):
        found = json.loads(cli("score", *models.options, "--input", path, "--json", option).out)
        expected = model.score([prompt], [response])[0].rewards["one"].total
        assert found["scores"][0]["chosen"]["one"] == pytest.approx(expected, abs=1e-3)


def test_responses_cut_on_purpose_get_no_end_token(cli: Callable, models: Any, model: GenARM, tmp_path: Path) -> None:
    row = {"prompt": "the cat", "chosen": "sat", "rejected": "ran", "chosen_complete": False}
    path = write_lines(tmp_path / "pairs.jsonl", [row])
    scores = json.loads(cli("score", *models.options, "--input", path, "--json").out)["scores"][0]
    cut = model.score([chat("the cat")], ["sat"], append_eos=False)[0].rewards["one"].total
    assert scores["chosen"]["one"] == pytest.approx(cut, abs=1e-3)


def test_lines_of_pairs_are_those_of_the_file(cli: Callable, models: Any, tmp_path: Path) -> None:
    """Blank lines and dropped lines count too."""
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path = tmp_path / "pairs.jsonl"
    for bad in ({"prompt": "a", "chosen": "b " * 300, "rejected": "c"}, {"prompt": "", "chosen": "b", "rejected": "c"}):
        path.write_text(f"{good}\n\n{good}\n{json.dumps(bad)}\n")
        result = cli("score", *models.options, "--input", path)
        assert (result.code, result.out) == (2, "")
        assert "pairs.jsonl line 4: " in result.err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "response": "a"}, "line 2: prompt: expected text"),
        ({"prompt": "a", "response": 5}, "line 2: response=5: expected text"),
        ({"response": "a"}, "line 2: prompt=None: expected text"),
        ({"prompt": "a", "response": "\ud800"}, "line 2: response='\\ud800': expected Unicode text"),
        ({"prompt": "a\ud800", "response": "b"}, "line 2: prompts[0]"),
        ({"prompt": "a " * 300, "response": "b " * 300}, "line 2: "),
    ],
)
def test_a_bad_line_is_named(cli: Callable, models: Any, tmp_path: Path, row: dict, message: str) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "response": "b"}, row])
    result = cli("score", *models.options, "--input", path)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
