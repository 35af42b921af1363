"""Batch jobs on a stand-in for the model: resuming, order, errors, checks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genarm_fast import SamplingParams
from genarm_fast.jobs import JobRequest, ResultsFile, Summary, read_requests, run
from genarm_fast.jobs.identity import identity
from genarm_fast.jobs.inputs import line_seed
from genarm_fast.outputs import Completion, GenerationOutput, Rounds, Timing, Usage

SETUP = "setup"


class FakeModel:
    """A model whose answers repeat the prompt, its parameters and its batch, so that a change of any shows."""

    max_batch_size = 3
    tokenizer = None

    def __init__(self, failing: Sequence[str] = (), crashing: Sequence[str] = (), refused: Sequence[str] = ()) -> None:
        self.failing, self.crashing, self.refused = failing, crashing, refused
        self.batches: list[list[Any]] = []
        self.prepared: list[Any] = []

    def prepare(self, prompts: Sequence[Any], sampling_params: SamplingParams) -> list[Any]:
        self.prepared += prompts
        if prompts[0] in self.refused:
            raise ValueError("too long")
        return [SimpleNamespace(token_ids=[[1]])]

    def as_completed(
        self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, GenerationOutput | Exception]]:
        """Yield the answers with odd indices first."""
        self.batches.append(list(prompts))
        for i, (prompt, params) in sorted(enumerate(zip(prompts, sampling_params)), key=lambda pair: -(pair[0] % 2)):
            if prompt in self.crashing:
                raise MemoryError("out of memory")
            if prompt in self.failing:
                yield i, RuntimeError("not finite")
                continue
            text = f"{prompt} {params.seed} {params.temperature} in {prompts}"
            completion = Completion(text, [1, 2], "length", None, params.seed or 0, [(1.0,), (1.0,)])
            timing = Timing(0.1, 0.2, 10.0)
            yield i, GenerationOutput(prompt, [1], [completion], Usage(1, 2), timing, Rounds(2, 0, 0))


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def one_batch_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genarm_fast.jobs.GROUP_BATCHES", 1)


@pytest.fixture
def requests(tmp_path: Path) -> list[JobRequest]:
    """Seven requests, so that batches of three leave a short one."""
    rows = [{"prompt": f"p{i}"} for i in range(7)]
    return list(read_requests(write_lines(tmp_path / "in.jsonl", rows), SamplingParams(), arms=1))


def run_job(model: FakeModel, requests: list[JobRequest], path: Path, **options: Any) -> Summary:
    with ResultsFile(path, requests, SETUP, **options) as results:
        return run(model, requests, results)


def test_answers_are_in_order_with_ids_and_without_timing(requests: list[JobRequest], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    summary = run_job(FakeModel(), requests, path)
    rows = read_lines(path)
    assert [row["prompt"] for row in rows] == [f"p{i}" for i in range(7)]
    assert [row["id"] for row in rows] == list(range(1, 8))
    assert "timing" not in rows[0]
    assert summary == Summary(requests=7, kept=0, answered=7, completion_tokens=14)


def test_progress_counts_lines_and_tokens(requests: list[JobRequest], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with ResultsFile(tmp_path / "out.jsonl", requests, SETUP) as results:
        run(FakeModel(), requests, results, lambda lines, tokens: seen.append((lines, tokens)))
    assert seen == [(1, 2)] * 7


def test_every_cut_resumes_to_the_same_bytes(requests: list[JobRequest], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests, path)
    whole = path.read_bytes()
    for size in range(0, len(whole) + 1, 23):
        path.write_bytes(whole[:size])
        model = FakeModel()
        summary = run_job(model, requests, path)
        assert path.read_bytes() == whole
        kept = whole[:size].count(b"\n")
        assert (summary.kept, summary.answered) == (kept, 7 - kept)
        assert len(model.batches) == 3 - kept // 3  # finished batches are not decoded again


def test_finished_job_does_nothing(requests: list[JobRequest], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests, path)
    model = FakeModel()
    assert run_job(model, requests, path).kept == 7
    assert model.batches == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, prompt="other"), "line 2: id 2 was answered for another prompt or other parameters"),
        (lambda r: replace(r, params=r.params.override(temperature=0.5)), "another prompt or other parameters"),
        (lambda r: replace(r, params=r.params.override(weights=[2.0])), "another prompt or other parameters"),
        (lambda r: replace(r, params=r.params.override(seed=0)), "another prompt or other parameters"),
        (lambda r: replace(r, id="x"), "another prompt or other parameters"),
    ],
)
def test_changed_request_is_refused(requests: list[JobRequest], tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests, path)
    before = path.read_bytes()
    changed = [requests[0], change(requests[1]), *requests[2:]]
    with pytest.raises(ValueError, match=message):
        run_job(FakeModel(), changed, path)
    assert path.read_bytes() == before
    assert run_job(FakeModel(), changed, path, overwrite=True).answered == 7


def test_other_models_are_refused(requests: list[JobRequest], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests, path)
    with pytest.raises(ValueError, match="line 1: made with other models"):
        ResultsFile(path, requests, "another setup")


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"a": 1}\n', b"[1]\n", b"\0\0\0\n", b'{"id": 2'])
def test_foreign_file_is_left_alone(requests: list[JobRequest], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"out.jsonl line 1: expected a line of this job"):
        run_job(FakeModel(), requests, path)
    assert path.read_bytes() == content


def test_surplus_lines_are_refused_and_added_requests_are_answered(requests: list[JobRequest], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests[:6], path)
    with pytest.raises(ValueError, match="line 6: expected one line per request, 5 at most"):
        run_job(FakeModel(), requests[:5], path)
    assert run_job(FakeModel(), requests, path).kept == 6
    assert len(read_lines(path)) == 7


@pytest.mark.parametrize("fault", ["failing", "crashing"])
def test_one_failing_request_gets_an_error_line_and_is_tried_again(
    requests: list[JobRequest], tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests, path)
    healthy = read_lines(path)
    path.unlink()

    summary = run_job(FakeModel(**{fault: ["p1", "p6"]}), requests, path)
    rows = read_lines(path)
    assert [row["id"] for row in rows if "error" in row] == [2, 7] == [id for id, _ in summary.errors]
    assert summary.answered == 5
    assert all("p1" not in message or "p6" not in message for _, message in summary.errors)

    summary = run_job(FakeModel(failing=["p6"]), requests, path)
    assert (summary.kept, summary.answered, len(summary.errors)) == (5, 1, 1)
    assert run_job(FakeModel(), requests, path).answered == 1
    rows = read_lines(path)
    assert [row["id"] for row in rows] == list(range(1, 8))
    assert rows[3:6] == healthy[3:6]
    assert not list(tmp_path.glob("*.tmp"))


def test_errors_before_an_interruption_and_the_rest_are_both_made_good(
    requests: list[JobRequest], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(failing=["p0"]), requests, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    summary = run_job(FakeModel(), requests, path)
    assert (summary.kept, summary.answered, summary.errors) == (3, 4, [])
    assert [row["prompt"] for row in read_lines(path)] == [f"p{i}" for i in range(7)]


def test_overwriting_spares_the_old_lines_until_there_are_new_ones(requests: list[JobRequest], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_job(FakeModel(), requests, path)
    before = path.read_bytes()
    with ResultsFile(path, requests, "other", overwrite=True) as results:
        assert path.read_bytes() == before
        run(FakeModel(), requests[:2], results)
    assert [row["setup"] for row in read_lines(path)] == ["other", "other"]


def test_two_jobs_cannot_write_one_file(requests: list[JobRequest], tmp_path: Path) -> None:
    with (
        ResultsFile(tmp_path / "out.jsonl", requests, SETUP),
        pytest.raises(BlockingIOError, match="another running job"),
    ):
        ResultsFile(tmp_path / "out.jsonl", requests, SETUP)
    ResultsFile(tmp_path / "out.jsonl", requests, SETUP).__exit__(None, None, None)


def test_what_cannot_be_read_again_is_refused(requests: list[JobRequest], tmp_path: Path) -> None:
    """A terminal, a pipe and /dev/full would be read forever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a regular file"):
        ResultsFile(tmp_path / "pipe", [], SETUP)


def test_lines_override_the_defaults(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "temperature": 0.5, "weights": [1, -2], "logit_bias": {"7": -1}, "id": {"any": "value"}},
        {"prompt": [{"role": "user", "content": "b"}], "seed": 5, "stop": "x"},
        {"prompt": [1, 2, 3], "seed": None},
    ]
    path = write_lines(tmp_path / "in.jsonl", rows)
    first, second, third = read_requests(path, SamplingParams(temperature=0.9, top_k=4, seed=11), arms=2)
    assert (first.params.temperature, first.params.top_k, first.params.weights) == (0.5, 4, (1.0, -2.0))
    assert (first.params.logit_bias, first.id, first.params.seed) == ({7: -1}, {"any": "value"}, line_seed(11, 1))
    assert (second.params.seed, second.params.stop, second.id) == (5, ("x",), 2)
    assert (third.prompt, third.params.seed) == ([1, 2, 3], line_seed(11, 3))


@pytest.mark.parametrize(("name", "value", "default"), [("max_time", 0.5, "None"), ("priority", 1, "0")])
def test_what_depends_on_the_machine_is_refused(tmp_path: Path, name: str, value: Any, default: str) -> None:
    """Such parameters are refused in lines and for all lines: a resumed job would write other bytes."""
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=f"^{name}={value}: expected {default} in a batch job"):
        read_requests(path, SamplingParams(**{name: value}), arms=0)
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", name: value}])
    with pytest.raises(ValueError, match=f"line 1: .*{name}={value}: expected one of id, prompt"):
        read_requests(path, SamplingParams(), arms=0)


def test_seeds_of_lines_and_jobs_differ() -> None:
    assert len({line_seed(job, line) for job in range(30) for line in range(30)}) == 900


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "top_p": 1.5}', r"top_p=1.5: expected a number in \(0, 1\]"),
        (
            '{"prompt": "a", "temprature": 1}',
            "temprature=1: expected one of id, prompt, tools, chat_template_kwargs, metadata, weights",
        ),
        ('{"prompt": "a", "logits_processors": []}', r"logits_processors=\[\]: expected one of"),
        ('{"prompt": "a", "weights": [1, 2, 3]}', r"weights=.*: expected 2 numbers, one per ARM, got 3"),
        ('{"prompt": "a", "weights": ["1", 2]}', "weights=.*expected finite numbers"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias=.*expected an object"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias=.*expected an object"),
        ('{"prompt": "a", "logit_bias": {"5": 1, "05": 2}}', "logit_bias=.*expected an object"),  # the same token twice
        ('{"prompt": "a", "logit_bias": {"\\u0665": 1}}', "logit_bias=.*expected an object"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"prompt": [{"role": "user", "role": "system", "content": "a"}]}', "the key 'role' is there twice"),
        ('{"prompt": "a", "metadata": {"x": NaN}}', "metadata=.*nan.*: expected what an output line can hold"),
        (r'{"prompt": "a", "metadata": "\ud800"}', "metadata=.*: expected what an output line can hold"),
        (r'{"prompt": "a", "stop": "\ud800"}', "stop=.*: expected Unicode text"),
        ('{"text": "a"}', "text='a': expected one of"),
        ("{}", "prompt=None: expected text"),
        ('{"prompt": {"role": "user", "content": "a"}}', "prompt=.*: expected text"),
        ('{"prompt": ""}', "expected a non-empty prompt"),
        ('{"prompt": [{"role": "user"}]}', "'content'"),
        ('{"prompt": 5}', "prompt=5: expected text"),
        ('{"prompt": "a", "id": 1}', "id=1: expected each id once, line 1 has it too"),
        ('{"prompt": "a", "id": NaN}', "id=nan: expected what an output line can hold"),
        ('{"prompt": "a", "id": [{"b": -1e999}]}', "id=.*-inf.*: expected what an output line can hold"),
        (r'{"prompt": "a", "id": "\ud800"}', "id=.*: expected what an output line can hold"),
        ('{"prompt": "a"', "line 3"),
        ("[1]", "expected a JSON object"),
        ('{"prompt": "\xff"}', "line 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=rf"in.jsonl line 3: .*{message}" if "line 3" not in message else message):
        read_requests(path, SamplingParams(), arms=2)


def test_weights_by_the_name_of_no_arm(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "weights": {"two": 1}}, {"prompt": "a", "weights": {"tow": 1}}]
    path = write_lines(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match=r"in\.jsonl line 2: weights: 'tow': expected 'one', 'two'"):
        read_requests(path, SamplingParams(), arms=["one", "two"])
    write_lines(path, [{"prompt": "a", "weights": [1, 2, 3]}])
    with pytest.raises(ValueError, match=r"in\.jsonl line 1: weights=.*: expected 2 numbers, one per ARM, got 3"):
        read_requests(path, SamplingParams(), arms=["one", "two"])
    assert len(read_requests(write_lines(path, rows), SamplingParams(), arms=2)) == 2  # no names to compare with


def test_empty_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="found none"):
        read_requests(tmp_path / "in.jsonl", SamplingParams(), arms=0)


def test_identity_follows_the_content_of_a_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096 * 8)  # 8 MiB: sampled, not read whole
    assert identity(str(one)) == identity(str(two))
    (two / "README.md").write_text("a card")
    assert identity(str(one)) == identity(str(two))
    (two / "model.safetensors").write_bytes(bytes(reversed(range(256))) * 4096 * 8)
    assert identity(str(one)) != identity(str(two))
    assert identity("owner/model") == "owner/model"
