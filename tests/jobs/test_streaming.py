"""A job reads its input as it runs: in bounded memory, in groups that a resumed job finds again, checked ahead."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from test_jobs import SETUP, FakeModel, read_lines, run_job, write_lines

from genarm_fast import SamplingParams
from genarm_fast.jobs import ResultsFile, read_requests, run


@pytest.fixture(autouse=True)
def two_batches_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm_fast.jobs.GROUP_BATCHES", 2)


def requests_of(tmp_path: Path, rows: list[dict[str, Any]], **defaults: Any) -> Any:
    return read_requests(write_lines(tmp_path / "in.jsonl", rows), SamplingParams(**defaults), arms=0)


def test_groups_are_found_again_from_every_cut(tmp_path: Path) -> None:
    """Lines that ask for many completions make groups shorter. The answers of a group name the requests in it."""
    completions = [1, 1, 3, 1, 2, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1, 6, 1]
    requests = requests_of(tmp_path, [{"prompt": f"p{i}", "n": n} for i, n in enumerate(completions)])
    path, model = tmp_path / "out.jsonl", FakeModel()
    run_job(model, requests, path)
    groups = [[int(prompt[1:]) for prompt in batch] for batch in model.batches]
    assert groups == [[0, 1, 2, 3], [4, 5], [6], [7], [8, 9, 10, 11], [12, 13, 14], [15], [16]]
    whole = path.read_bytes()
    assert [row["prompt"] for row in read_lines(path)] == [f"p{i}" for i in range(len(completions))]
    for kept in range(len(completions)):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]) + b'{"id')
        again = FakeModel()
        run_job(again, requests, path)
        assert path.read_bytes() == whole
        assert again.batches == [batch for batch in model.batches if int(batch[-1][1:]) >= kept]


def test_lines_are_written_before_their_group_ends(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, [{"prompt": f"p{i}"} for i in range(6)])
    path = tmp_path / "out.jsonl"

    class Stops(FakeModel):
        def as_completed(self, *arguments: Any) -> Any:
            for i, output in enumerate(super().as_completed(*arguments)):
                if i == 5:
                    raise KeyboardInterrupt
                yield i, output[1]

    with pytest.raises(KeyboardInterrupt):
        run_job(Stops(), requests, path)
    assert len(read_lines(path)) == 3  # one batch


def test_one_bad_request_costs_few_decodings_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm_fast.jobs.GROUP_BATCHES", 32)
    requests = requests_of(tmp_path, [{"prompt": f"p{i}"} for i in range(64)])
    model = FakeModel(crashing=["p60"])  # requests with odd indices have ended before
    summary = run_job(model, requests, tmp_path / "out.jsonl")
    assert (summary.answered, summary.failed) == (63, 1)
    assert summary.errors == [(61, "MemoryError: out of memory")]
    assert [len(batch) for batch in model.batches] == [64, 1, 1]
    model = FakeModel(crashing=["p0"])
    run_job(model, requests, tmp_path / "other.jsonl")
    assert sum(map(len, model.batches)) < 3 * 64


@pytest.mark.parametrize("bad", [5, 20])
def test_a_prompt_that_is_refused_late_stops_the_job_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setattr("genarm_fast.jobs.FIRST_CHECK_SECONDS", 0.0)
    monkeypatch.setattr("genarm_fast.jobs.CHECK_TIME_SHARE", 0.0)
    requests = requests_of(tmp_path, [{"prompt": f"p{i:02}"} for i in range(24)])
    path, model = tmp_path / "out.jsonl", FakeModel(refused=[f"p{bad:02}"])
    with pytest.raises(ValueError, match=rf"in\.jsonl line {bad + 1}: too long"):
        run_job(model, requests, path)
    assert len(read_lines(path) if path.stat().st_size else []) == bad // 6 * 6
    assert run_job(FakeModel(), requests, path).kept == bad // 6 * 6
    assert len(read_lines(path)) == 24


def test_prompts_are_checked_ahead_and_the_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(24)]
    rows[17]["prompt"] = "a long prompt"
    requests = requests_of(tmp_path, rows)
    model = FakeModel(refused=["p20"])  # in the last group
    with pytest.raises(ValueError, match=r"in\.jsonl line 21: too long"):
        run_job(model, requests, tmp_path / "out.jsonl")
    assert model.batches == []
    assert model.prepared == ["a long prompt", *(row["prompt"] for row in rows[:21])]
    monkeypatch.setattr("genarm_fast.jobs.FIRST_CHECK_SECONDS", 0.0)
    model = FakeModel(refused=["a long prompt"])
    with pytest.raises(ValueError, match=r"in\.jsonl line 18: too long"):
        run_job(model, requests, tmp_path / "out.jsonl")
    assert (model.batches, model.prepared) == ([], ["a long prompt"])


@pytest.mark.parametrize(
    "named",
    [
        {"stop_token_ids": [7, 300]},
        {"suppress_tokens": [300]},
        {"allowed_token_ids": [300, 5]},
        {"logit_bias": {"300": 1.0}},
        {"logprobs": 301},
    ],
)
def test_the_highest_token_that_a_line_names_is_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, Any]
) -> None:
    """The model alone knows the vocabulary, and a job may take days until the line's own turn."""
    rows = [{"prompt": f"p{i}", "stop_token_ids": [i]} for i in range(24)]
    rows[17] |= {"stop_token_ids": [], **named}
    requests = requests_of(tmp_path, rows)
    assert requests.widest is not None
    assert requests.widest.line == 18
    monkeypatch.setattr("genarm_fast.jobs.FIRST_CHECK_SECONDS", 0.0)
    model = FakeModel(refused=["p17"])
    with pytest.raises(ValueError, match=r"in\.jsonl line 18: too long"):
        run_job(model, requests, tmp_path / "out.jsonl")
    assert (model.batches, model.prepared) == ([], ["p10", "p17"])  # the longest prompt before it


def test_requests_that_name_no_token(tmp_path: Path) -> None:
    assert requests_of(tmp_path, [{"prompt": "a"}]).widest is None


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        requests = None
        path = tmp_path / "in.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps({"prompt": f"a prompt of some length, number {i}"}) + "\n" for i in range(lines))
        tracemalloc.start()
        requests = read_requests(path, SamplingParams(), arms=0)
        with ResultsFile(tmp_path / f"out-{lines}.jsonl", requests, SETUP) as results:
            model = FakeModel()
            model.batches = model.prepared = Nothing()
            model.max_batch_size = 100  # few writes, as each waits for the disk
            run(model, requests, results)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(200)  # the first call loads modules
    few, many = peak(500), peak(4_500)
    assert (many - few) / 4_000 < 100  # bytes per line; a request takes a thousand


class Nothing(list[Any]):
    """A list that keeps nothing."""

    def append(self, item: Any) -> None:
        pass

    def __iadd__(self, items: Any) -> Any:
        return self


def test_requests_are_a_sequence(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, [{"prompt": f"p{i}"} for i in range(9)])
    assert (len(requests), len(requests[2:]), len(requests[2:][3:5]), len(requests[20:])) == (9, 7, 2, 0)
    assert [each.prompt for each in requests[2:][3:5]] == ["p5", "p6"]
    assert (requests[3].prompt, requests[-1].prompt, requests[2:][0].line) == ("p3", "p8", 3)
    assert list(requests[20:]) == []
    with pytest.raises(IndexError):
        requests[9]
    with pytest.raises(ValueError, match="step=2"):
        requests[::2]


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, [{"prompt": f"p{i}"} for i in range(9)])
    text = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(text + '{"prompt": "more"}\n')
    assert len(list(requests)) == 9  # added lines are for the next run
    (tmp_path / "in.jsonl").write_text(text.replace("p4", "p!"))
    with pytest.raises(ValueError, match=r"in\.jsonl line 5: expected the line that was there when the job began"):
        list(requests)
    (tmp_path / "in.jsonl").write_text(text[: len(text) // 2 - 3])
    with pytest.raises(ValueError, match=r"in\.jsonl.*: expected the line that was there"):
        list(requests)


def test_a_pipe_can_be_read_and_a_device_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": ""}\n',))
    writer.start()
    with pytest.raises(ValueError, match=r"pipe line 3: .*expected a non-empty prompt"):
        read_requests(pipe, SamplingParams(), arms=0)
    writer.join()
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "a"}\n{"prompt": "b"}\n',))
    writer.start()
    requests = read_requests(pipe, SamplingParams(), arms=0)
    writer.join()
    assert [[each.prompt for each in requests] for _ in range(2)] == [["a", "b"]] * 2
    with pytest.raises(ValueError, match="/dev/zero: expected a file or a pipe"):
        read_requests("/dev/zero", SamplingParams(), arms=0)


def test_lines_of_other_parameters_do_not_share_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "temperature": value} for value in (0.5, 1, 1.0, 0.5)]
    rows += [{"prompt": "a", "temperature": 0.5, "top_k": 3}, {"prompt": "a", "seed": 7}, {"prompt": "a"}]
    found = [each.params for each in requests_of(tmp_path, rows, temperature=0.25, seed=3)]
    assert [each.temperature for each in found] == [0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert [each.top_k for each in found] == [0, 0, 0, 0, 3, 0, 0]
    assert len({each.seed for each in found}) == 7
    assert found[5] == SamplingParams(temperature=0.25, seed=7)
