"""`genarm-fast generate --input --output`: kills, resumption and errors with real (tiny) models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REQUESTS = 24


@pytest.fixture
def job(models: Any, tmp_path: Path) -> tuple[list[str], Path]:
    """A job's command line without its output, and a folder for the output."""
    rows: list[dict[str, Any]] = [{"prompt": f"the cat {i} " * (1 + i % 3)} for i in range(REQUESTS)]
    rows[3] |= {"weights": [0.5, 2], "temperature": 0.5, "id": "three"}
    rows[8] |= {"prompt": [{"role": "user", "content": "hello"}], "n": 2}
    rows[9] |= {"prompt": [40, 41, 42], "seed": 12}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max-batch-size=4", "--max-new-tokens=40", "--ignore-eos", "--rewards", "--logprobs=1", "--seed=3"]
    return ["generate", "--input", str(path), *models.options, *options], tmp_path


def test_killed_job_resumes_to_the_same_bytes(cli: Callable, job: tuple[list[str], Path]) -> None:
    command, folder = job
    whole, killed = folder / "whole.jsonl", folder / "killed.jsonl"
    assert cli(*command, "--output", whole).code == 0

    process = subprocess.Popen([sys.executable, "-m", "genarm_fast", *command, "--output", str(killed)])
    deadline = time.monotonic() + 60
    while (not killed.exists() or killed.read_bytes().count(b"\n") < REQUESTS // 4) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = killed.read_bytes().count(b"\n")
    assert REQUESTS // 4 <= kept < REQUESTS

    result = cli(*command, "--output", killed)
    assert result.code == 0
    assert f"{REQUESTS - kept} answered, {kept} kept from an earlier run, 0 failed" in " ".join(result.err.split())
    assert killed.read_bytes() == whole.read_bytes()


def test_stdout_is_no_output_of_a_job(
    cli: Callable, job: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file named "-" would be a surprise."""
    command, folder = job
    monkeypatch.chdir(folder)
    result = cli(*command, "--output", "-")
    assert (result.code, result.out) == (2, "")
    assert "--output -: expected a file" in result.err
    assert not (folder / "-").exists()


def test_answers(cli: Callable, job: tuple[list[str], Path]) -> None:
    command, folder = job
    result = cli(*command, "--output", folder / "out.jsonl", "--json")
    assert result.code == 0
    assert json.loads(result.out)["answered"] == REQUESTS
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [1, 2, 3, "three", *range(5, REQUESTS + 1)]
    assert rows[0]["prompt"] == [{"role": "user", "content": "the cat 0 "}]
    assert rows[3]["completions"][0]["weights"][0] == [0.5, 2.0]
    assert rows[0]["completions"][0]["weights"][0] == [1.5, -0.25]
    assert len(rows[8]["completions"]) == 2
    assert (rows[9]["prompt"], rows[9]["completions"][0]["seed"]) == ([40, 41, 42], 12)
    assert set(rows[0]["completions"][0]["rewards"]) == {"one", "two"}
    assert len({row["completions"][0]["seed"] for row in rows}) == REQUESTS

    before = (folder / "out.jsonl").read_bytes()
    assert cli(*command, "--output", folder / "out.jsonl", "--seed", "4").code == 2
    assert (folder / "out.jsonl").read_bytes() == before
    assert cli(*command, "--output", folder / "out.jsonl", "--seed", "4", "--overwrite").code == 0
    assert (folder / "out.jsonl").read_bytes() != before


def test_other_models_or_templates_are_another_job(cli: Callable, job: tuple[list[str], Path], models: Any) -> None:
    command, folder = job
    output = ["--output", str(folder / "out.jsonl"), "--max-new-tokens", "2"]
    assert cli(*command, *output).code == 0
    (folder / "chat.jinja").write_text("{{ messages[0].content }}")
    templates = [
        "--prompt-template={prompt}!",
        "--arm-prompt-template={prompt}!",
        f"--chat-template={folder}/chat.jinja",
    ]
    for change in (*templates, "--raw", "--system=x", "--dtype=bfloat16"):
        assert "line 1: made with other models" in cli(*command, *output, change).err
    heavier = [argument.replace("=1.5", "=1.6") for argument in command]
    assert "line 1: made with other models" in cli(*heavier, *output).err
    os.rename(models.arm, models.arm.with_name("moved"))
    try:
        moved = [argument.replace(str(models.arm), str(models.arm.with_name("moved"))) for argument in command]
        assert f"{REQUESTS} kept" in cli(*moved, *output).err
    finally:
        os.rename(models.arm.with_name("moved"), models.arm)


def test_all_lines_are_checked_before_any_work(cli: Callable, job: tuple[list[str], Path]) -> None:
    command, folder = job
    with open(folder / "in.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "the cat " * 300}) + "\n")
    result = cli(*command, "--output", folder / "out.jsonl")
    assert result.code == 2
    assert f"in.jsonl line {REQUESTS + 1}: " in result.err
    assert "expected at most 512, the context of base" in result.err
    assert (folder / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"weights": {"one": 1, "tow": 2}}, "weights: 'tow': expected 'one', 'two'"),
        ({"stop_token_ids": [300]}, "stop_token_ids: token id 300: expected less than 300"),
        ({"logprobs": 301}, "logprobs=301: expected at most 300, the vocabulary"),
    ],
)
def test_what_only_the_models_tell_of_a_line_is_checked_before_any_work(
    cli: Callable, job: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], message: str
) -> None:
    command, folder = job
    monkeypatch.setattr("genarm_fast.jobs.FIRST_CHECK_SECONDS", 0.0)  # the checks end at once
    monkeypatch.setattr("genarm_fast.jobs.GROUP_BATCHES", 1)
    with open(folder / "in.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "the cat", **line}) + "\n")
    result = cli(*command, "--output", folder / "out.jsonl")
    assert result.code == 2
    assert f"in.jsonl line {REQUESTS + 1}: " in result.err
    assert message in result.err
    assert not (folder / "out.jsonl").exists() or (folder / "out.jsonl").read_bytes() == b""


def test_failed_requests_are_reported_and_tried_again(
    cli: Callable, job: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, folder = job
    command = [*command, "--output", str(folder / "out.jsonl")]
    with monkeypatch.context() as patch:
        from genarm_fast.engine.sequence import Sequence

        append = Sequence.append

        def failing(self: Sequence, *drawn: Any) -> None:
            if self.request.prompt == [40, 41, 42]:
                raise RuntimeError("a fault in the middle")
            append(self, *drawn)

        patch.setattr(Sequence, "append", failing)
        result = cli(*command)
    assert result.code == 1
    assert "id 10: RuntimeError: a fault in the middle" in result.err
    assert f"{REQUESTS - 1} answered, 0 kept from an earlier run, 1 failed" in " ".join(result.err.split())
    result = cli(*command)
    assert result.code == 0
    assert f"1 answered, {REQUESTS - 1} kept from an earlier run, 0 failed" in " ".join(result.err.split())


@pytest.mark.parametrize("openai", [False, True])
def test_a_template_that_renders_the_date(cli: Callable, models: Any, tmp_path: Path, openai: bool) -> None:
    """On the next day, the rest of the job would read other prompts than its first lines did."""
    messages = [{"role": "user", "content": "the cat"}]
    asked = [{"custom_id": str(i), "url": "/v1/chat/completions", "body": {"messages": messages}} for i in range(2)]
    rows = asked if openai else [{"prompt": messages}] * 2
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["generate", "--base", str(models.base), "--max-new-tokens=3", "--input", tmp_path / "in.jsonl"]
    run += ["--chat-template", tmp_path / "day.jinja", "--output", tmp_path / "out.jsonl"]
    (tmp_path / "day.jinja").write_text("{{ messages[0].content }}{{ strftime_now('%s') }}{{ range(8) | join }}")
    assert cli(*run).code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert cli(*run).code == 0, "nothing is left to do"
    cut = whole.splitlines(keepends=True)[0]
    if openai:  # the output of such lines has only the number of prompt tokens
        cut = re.sub(rb'"prompt_tokens": \d+', b'"prompt_tokens": 7', cut)
    (tmp_path / "out.jsonl").write_bytes(cut)
    time.sleep(1.1)
    result = cli(*run)
    assert (result.code, (tmp_path / "out.jsonl").read_bytes()) == (2, cut)
    assert "out.jsonl line 1: its prompt had other tokens than it has now" in " ".join(result.err.split())


def test_an_output_that_is_not_what_its_name_says(cli: Callable, job: tuple[list[str], Path]) -> None:
    """A job appends plain lines, which gzip could not read."""
    command, folder = job
    for ending in (".gz", ".zst", ".parquet"):
        result = cli(*command, "--output", folder / f"out.jsonl{ending}")
        assert (result.code, f"expected another ending than {ending}" in result.err) == (2, True)
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl"]


def test_lines_from_stdin(job: tuple[list[str], Path]) -> None:
    command, folder = job
    lines = (folder / "in.jsonl").read_bytes().splitlines(keepends=True)[:2]
    run = [sys.executable, "-m", "genarm_fast", *command, "--input", "-", "--output", str(folder / "out.jsonl")]
    subprocess.run(run, input=b"".join(lines), check=True, timeout=300)
    (folder / "in.jsonl").write_bytes(b"".join(lines))
    subprocess.run([*run[:-4], "--output", str(folder / "file.jsonl")], check=True, timeout=300)
    assert (folder / "out.jsonl").read_bytes() == (folder / "file.jsonl").read_bytes() != b""


def test_input_and_output_must_differ(cli: Callable, job: tuple[list[str], Path]) -> None:
    command, folder = job
    before = (folder / "in.jsonl").read_bytes()
    result = cli(*command, "--output", folder / "in.jsonl", "--overwrite")
    assert (result.code, (folder / "in.jsonl").read_bytes()) == (2, before)
