"""Tests of the GPU benchmark: a trial of the whole script at toy size, and tests of its parts."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model

from genarm_fast import GenARM

ROOT = Path(__file__).parents[2]
MARKED = "pytestmark = [" + "pytest.mark.gpu"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: importlib.import_module(f"gpu_bench.{name}")


def gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_trial(part, tmp_path):
    """Every row has finite numbers, every token equals the reference's, and the table names every goal."""
    done = gpu("--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == [row.name for row in part("rows").ROWS]
    rows = part("report").with_numbers(result)
    missing = [row for row in result["rows"] if row["name"] not in rows]
    assert [row["skipped"] for row in missing] == ["nsys is not installed, or has no GPU to look at"], missing
    assert part("schedule").not_finite(result) == []
    assert result["no_time_for"] == []
    assert rows["gpu tests"]["compiled"] == len(part("settings").DRY.jobs)
    assert rows["tokens, SmolLM2"]["equal"] == rows["tokens, widened"]["equal"] == 1
    assert rows["tokens, widened"]["texts that drafts leave alone"] == 1
    assert all(rows[name]["peak_bytes"] > 0 and rows[name]["x_w"] > 0 for name in ("base", "2 LoRAs", "drafts"))
    assert rows["profile"]["launches_per_token"] > 10
    heads = [line["head"] for line in rows["training"]["lines"]]
    text = path.with_suffix(".md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith(("| fro", "| tra"))] == heads
    goals = [line for line in text.splitlines() if any(f"| {goal.title} |" in line for goal in part("goals").GOALS)]
    assert len(goals) == len(part("goals").GOALS)
    assert not [line for line in goals if line.split("|")[5].strip() == "-"]  # a goal with this cell was not measured
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_trials_leave_the_results_alone():
    done = gpu("--dry", "--out", "benchmarks/results/x")
    assert done.returncode == 2
    assert "expected another folder" in done.stderr
    assert not (ROOT / "benchmarks/results/x").exists()


@pytest.mark.parametrize(("options", "said"), [(["--only", "X"], "--only 'X'"), (["--budget", "0"], "--budget 0")])
def test_wrong_arguments(options, said):
    done = gpu("--dry", *options)
    assert done.returncode != 0
    assert said in done.stderr


def test_every_test_that_needs_a_gpu_is_run(part):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*gpu*.py")}
    assert set(part("settings").GPU_TESTS) == {path for path in files if MARKED in (ROOT / path).read_text()}


def test_the_sampler_s_inputs_are_more_than_a_cache_holds(part, monkeypatch):
    sampler, setting = part("sampler"), part("settings").REAL
    made = []
    monkeypatch.setattr(sampler, "logits", lambda bench, rows, vocab: made.append(4 * rows * vocab) or (None, None))
    monkeypatch.setattr(sampler, "drawing", lambda *_: None)
    monkeypatch.setattr(sampler, "in_graph", lambda *_: 1.0)
    monkeypatch.setattr(sampler, "called", lambda *_: {"us": 1.0, "host_us": 1.0})
    for rows in setting.sampler_rows:
        made.clear()
        sampler.measure(SimpleNamespace(setting=setting), rows, 32000, 1e12)
        assert sum(made) > 100 << 20  # twice the 50 MB of an H100's L2 cache


def test_a_token_s_time_has_no_prefill_in_it(part, monkeypatch):
    measure, now = part("measure"), [0.0]
    monkeypatch.setattr(measure, "synchronized", lambda: now[0])
    ran = []

    def generate(tokens):
        now[0] += 5 + 0.25 * tokens

    found = measure.per_token(generate, (2, 10), 3, lambda: ran.append(1))
    assert found == {"ms": pytest.approx(250), "ms_spread": pytest.approx(0), "warm_up_seconds": 7.5}
    assert len(ran) == 3


SMALL = {"num_key_value_heads": 2, "tie_word_embeddings": True}
ON_CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_widened_models_have_the_small_one_s_function(part, copies):
    models = part("models")
    small = build_model("llama", 3, head_dim=8, **SMALL)
    for parameter in small.parameters():
        if parameter.ndim == 1:  # norms that are all ones would hide a mistake
            parameter.data += torch.linspace(-0.3, 0.3, len(parameter))
    wide = models.widened(small, 4e5, copies, ON_CPU)
    assert wide.num_parameters() == pytest.approx(4e5, rel=0.1)
    assert wide.config.hidden_size == 32 * copies
    tokens = torch.arange(2, 32)[None]
    with torch.inference_mode():
        expected, got = small(tokens).logits, wide(tokens).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        wide.model.layers[1].mlp.down_proj.weight[0, -1] = 1.0
        assert not torch.allclose(wide(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_widened_is_refused(part):
    models, small = part("models"), build_model("llama", 3, head_dim=8, **SMALL)
    with pytest.raises(ValueError, match="copies=3"):
        models.widened(small, 4e5, 3, ON_CPU)
    with pytest.raises(ValueError, match="expected more with 8 copies"):
        models.widened(small, 1e5, 8, ON_CPU)
    with pytest.raises(ValueError, match="model_type=qwen2"):
        models.widened(build_model("qwen2", 3), 4e5, 2, ON_CPU)


def test_bytes_that_a_step_reads(part):
    weight_bytes = part("models").weight_bytes
    untied, tied = (build_model("llama", 0, tie_word_embeddings=tie) for tie in (False, True))
    layers = sum(p.nbytes for p in untied.model.parameters()) - untied.model.embed_tokens.weight.nbytes
    assert weight_bytes(untied) == weight_bytes(tied) == layers + untied.lm_head.weight.nbytes


def test_lora_arms_are_lanes_of_the_base(part, tokenizer):
    """The ARMs use the base's own weights, each with different numbers in its adapter."""
    models = part("models")
    base = build_model("llama", 0)
    arms = [models.with_lora(base, seed, 2) for seed in (1, 2)]
    model = GenARM.from_pretrained(base, arms, tokenizer=tokenizer)
    assert len({id(member.shared) for member in model.members}) == 1
    params = {"seed": 1, "max_new_tokens": 20}
    outputs = [model.generate([[5, 6]], weights=weights, **params)[0] for weights in (0, [3, 0], [0, 3])]
    assert len({tuple(output.token_ids) for output in outputs}) == 3


@pytest.fixture
def bench(part):
    return part("measure").Bench(part("settings").DRY)


def test_tokens_of_the_reference_are_counted(part, bench, model):
    found = part("correctness").agreement(bench, model, [[5, 6, 7], [8, 9]], 1.0)
    assert found["equal"] == 1
    assert found["tokens"] == bench.setting.texts[0] * bench.setting.texts[1]


def test_other_tokens_are_counted_too(part, bench, model, monkeypatch):
    """This is the negative control: draws use the noise of another position, so some tokens must differ."""
    from genarm_fast.engine.step_tensors import State

    positions = State.response_positions
    monkeypatch.setattr(State, "response_positions", lambda self, width: positions(self, width) + 1)
    assert part("correctness").agreement(bench, model, [[5, 6, 7]], 1.0)["equal"] < 1


NSYS = """Generating SQLite file
Processing [report.sqlite] with [cuda_gpu_kern_sum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
75.0,3000000,600,5000.0,5000.0,4000,6000,10.0,nvjet_sm90
25.0,1000000,1000,1000.0,1000.0,900,1100,10.0,"void combine<float, 4>(int)"
"""


def test_kernels_by_nsys(part):
    profile = part("profile")
    found = profile.summary(profile.kernels_of(NSYS, 10))
    assert found["launches_per_token"] == 160
    assert found["device_us_per_token"] == 400
    assert [kernel["name"] for kernel in found["kernels"]] == ["nvjet_sm90", "void combine<float, 4>(int)"]
    with pytest.raises(ValueError, match="no table"):
        profile.kernels_of("error: no data", 10)


def test_goals_are_compared_with_what_was_measured(part):
    goals, report = part("goals"), part("report")
    about = {"gpu": "X", "date": "2026-11-28T10:00", "commit": "abc", "torch": "2", "triton": "3", "transformers": "5"}
    rows = [
        {"name": "1 LoRA", "ms": 6.0, "x_w": 1.2, "peak_bytes": 10**9},
        {"name": "Hugging Face, eager", "ms": 18.0, "x_w": 3.6},
        {"name": "2 LoRAs", "error": "RuntimeError: no"},
        {"name": "first token", "skipped": "no time left of 9 s"},
    ]
    text = report.markdown({"machine": about, "setting": "real", "rows": rows})
    assert "| + 1 LoRA ARM, batch 1 | 2.76 | 1.40 | ≤ 1.25 W | 1.2 W | 6 | yes |" in text
    assert "| guided against Hugging Face's base, eager | - | 3.9 | ≥ 4 x | 3 x | - | no |" in text
    assert all(f"| {goal.title} |" in text for goal in goals.GOALS)
    assert "- 2 LoRAs: RuntimeError: no" in text
    assert "- first token: no time left of 9 s" in text


def test_goals_of_the_sampler(part):
    line = {"vocab": 9, "read_us": 10.0, "python_us": {"draw": {"host_us": 30.0, "us": 50.0}}}
    line["graph_us"] = {"draw": 12.0, "with top_p and top_k": 36.0}
    lines = [line | {"rows": rows} for rows in (1, 64, 256)] + [copy.deepcopy(line) | {"rows": 8, "vocab": 5}]
    lines[-1]["python_us"]["draw"]["host_us"] = 70.0
    found = {what: value for what, value, *_ in part("goals").sampler_goals(lines)}
    assert found["called from Python: host time"] == 70
    assert found["in a graph, R = 64, against reading once"] == 1.2
    assert found["top-p and top-k against a plain draw, R = 256"] == 3
    assert found["top-p and top-k, R = 128"] is None
