"""`genarm-fast bench` on tiny models: which contenders are timed, what is reported, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_adapter
from transformers import GenerationMixin

from genarm_fast import GenARM
from genarm_fast.cli.bench import LABELS
from genarm_fast.kernels import _native
from genarm_fast.speculation.observations import PLAIN, Choice
from genarm_fast.speculation.tuner import Tuner

QUICK = ["--batch", "1", "2", "--new-tokens", "6", "--rounds", "2"]
SECONDS = {"hugging_face": 8.0, "base": 4.0, "guided": 5.0, "guided_drafts": 2.0}


class Calls:
    """Records what ran, by contender. A call takes the time in SECONDS; guided_drafts takes `growth` times longer each
    time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.growth = 1.0
        self.shapes: list[tuple[int, int, int]] = []  # Hugging Face's rows, prompt tokens, new tokens
        self.prompts: dict[str, list[Any]] = {}
        self.texts: dict[str, list[list[int]]] = {}
        self.slowed = 0
        monkeypatch.setattr("genarm_fast.bench.runs.clock_of", lambda devices: ("a test's clock", lambda: self.now))
        ours, theirs = GenARM.generate, GenerationMixin.generate

        def generate(model: GenARM, prompts: Any, *args: Any, **kwargs: Any) -> Any:
            name = "base" if not model.arms else "guided" if model.speculation.k == 0 else "guided_drafts"
            outputs = ours(model, prompts, *args, **kwargs)
            self.prompts.setdefault(name, []).append(prompts)
            self.texts.setdefault(name, []).extend(output.token_ids for output in outputs)
            self.spend(name)
            return outputs

        def hugging_face(model: Any, tokens: torch.Tensor, **kwargs: Any) -> Any:
            found = theirs(model, tokens, **kwargs)
            new = found.shape[1] - tokens.shape[1]
            self.shapes.append((len(tokens), int(kwargs["attention_mask"].sum()), new))
            self.spend("hugging_face")
            return found

        monkeypatch.setattr(GenARM, "generate", generate)
        monkeypatch.setattr(GenerationMixin, "generate", hugging_face)

    def spend(self, name: str) -> None:
        self.now += SECONDS[name]
        if name == "guided_drafts":
            self.now += SECONDS[name] * (self.growth**self.slowed - 1)
            self.slowed += 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_has_figures_of_each_contender_and_batch_size(cli: Callable, models: Any, calls: Calls) -> None:
    result = cli("bench", *models.options, *QUICK, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    about = found["about"]
    assert about["base"] == str(models.base)
    assert about["arms"] == {
        "one": {"model": str(models.arm), "weight": 1.5},
        "two": {"model": str(models.base), "weight": -0.25},
    }
    assert about["dtypes"] == dict.fromkeys(("base", "one", "two"), "float32")
    assert (about["device"], about["threads"], about["new_tokens"], about["rounds"]) == ("cpu", 1, 6, 2)
    assert set(about["versions"]) == {"genarm_fast", "torch", "transformers", "python"}
    assert sorted(name for group in about["forwards"] for name in group) == ["base", "one", "two"]
    assert [result["batch"] for result in found["results"]] == [1, 2]
    for result in found["results"]:
        batch = result["batch"]
        for name, seconds in SECONDS.items():
            speed = batch * 6 / seconds
            assert result["tokens_per_second"][name] == {"median": speed, "low": speed, "high": speed}
            assert result["milliseconds_per_token"][name] == pytest.approx(1e3 * seconds / 6)
            assert result["spreads"][name] == 0.0
            for unguided, others in result["relative_to"].items():
                assert name not in others or others[name]["median"] == SECONDS[unguided] / seconds
        assert {name: set(others) for name, others in result["relative_to"].items()} == {
            unguided: set(SECONDS) - {unguided} for unguided in ("hugging_face", "base")
        }
        assert result["clock"] == "a test's clock"
        assert not result["trusted"]  # two rounds are too few
        assert (result["drafts"]["texts"], result["drafts"]["same_texts"]) == (3 * batch, 3 * batch)


def test_contenders_are_what_their_names_say(cli: Callable, models: Any, calls: Calls) -> None:
    options = ["--batch", "3", "--new-tokens", "12", "--rounds", "1"]
    found = json.loads(cli("bench", *models.options, *options, "--json").out)["results"][0]
    lengths = [found["prompt_tokens"][0], found["prompt_tokens"][1]]
    assert [(rows, new) for rows, _, new in calls.shapes] == [(3, 12)] * 2
    assert all(3 * lengths[0] < tokens < 3 * lengths[1] for _, tokens, _ in calls.shapes)
    assert calls.prompts["base"] == calls.prompts["guided"] == calls.prompts["guided_drafts"]
    first, second = calls.prompts["base"]
    assert not any(prompt in first for prompt in second)
    assert {len(text) for texts in calls.texts.values() for text in texts} == {12}
    assert calls.texts["base"] != calls.texts["guided"]
    assert calls.texts["guided_drafts"] == calls.texts["guided"]
    base = GenARM.from_pretrained(models.base)
    assert calls.texts["base"][0] == base.generate(first[:1], seed=0, max_new_tokens=12, ignore_eos=True)[0].token_ids


def test_nobody_ends_early(
    cli: Callable, models: Any, calls: Calls, tmp_path: Path, tiny_model: Callable, tokenizer: Any
) -> None:
    ending = list(range(1, 250))
    tiny_model(seed=5, eos_token_id=ending).save_pretrained(tmp_path / "ending")
    tokenizer.save_pretrained(tmp_path / "ending")
    options = ["--batch", "1", "--new-tokens", "8", "--rounds", "1"]
    assert cli("bench", "--base", tmp_path / "ending", "--arm", models.arm, *options).code == 0
    assert [new for _, _, new in calls.shapes] == [8, 8]
    texts = [text for texts in calls.texts.values() for text in texts]
    assert [len(text) for text in texts] == [8] * 6
    # Each text contains an end token, else the test shows nothing.
    assert all(set(text) & set(ending) for text in texts)


def test_drafts_of_the_timed_rounds_are_counted(
    cli: Callable, models: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*models.options, "--batch", "1", "--new-tokens", "12", "--rounds", "2"]
    monkeypatch.setattr(Tuner, "choose", lambda self, rows: Choice(0, 1))  # drafts even if they do not pay
    found = json.loads(cli("bench", *options, "--json").out)["results"][0]["drafts"]
    steps = sum(found["chosen"].values())
    assert set(found["chosen"]) <= {"one, k=1", "plain"}  # "plain" is chosen where only one token is left
    assert 12 <= steps < 24
    assert found["tokens_per_step"] == 24 / steps
    assert found["accepted"] == 24 - steps
    assert found["drafted"] == found["chosen"]["one, k=1"]
    text = " ".join(cli("bench", *options).out.split())
    assert f"drafts: {found['drafted']}, {found['accepted'] / found['drafted']:.0%} right" in text
    plain = found["chosen"].get("plain", 0)
    assert f"one {steps - plain}, nobody {plain}; {24 / steps:.2f} tokens a step" in text
    monkeypatch.setattr(Tuner, "choose", lambda self, rows: PLAIN)
    assert "drafts: none in 24 steps" in " ".join(cli("bench", *options).out.split())


def test_table(cli: Callable, models: Any) -> None:
    result = cli("bench", *models.options, *QUICK)
    assert result.code == 0
    for expected in ("batch 1", "batch 2", *LABELS.values(), "weights: one=1.5, two=-0.25", "too short to trust: 2"):
        assert expected in result.out
    text = " ".join(result.out.split())
    assert ("WITHOUT THE C++ CORE" in text) == (_native.core is None)
    assert "all 3 texts are the same tokens" in text
    assert "all 6 texts are the same tokens" in text
    assert "CPU time of whole calls: 6 new tokens" in text
    assert max(map(len, result.out.splitlines())) <= 80
    bars = [line for line in result.out.splitlines() if line.startswith("│ base, Hugging")]
    assert len(bars) == 2
    assert all(line.split("│")[5].strip() == "" for line in bars)  # no ratio to itself


def test_wide_intervals_are_told_of_those_that_have_them(cli: Callable, models: Any, calls: Calls) -> None:
    calls.growth = 1.2
    options = ["--batch", "1", "--new-tokens", "2", "--rounds", "5"]
    text = " ".join(cli("bench", *models.options, *options).out.split())
    assert "too short to trust" in text
    for name, label in LABELS.items():
        assert (f"{label} ± " in text) == (name == "guided_drafts")
    calls.growth = 1.01
    assert "too short to trust" not in " ".join(cli("bench", *models.options, *options).out.split())


def test_changed_texts_are_told(cli: Callable, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = GenARM.generate

    def other(model: GenARM, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(model, *args, **kwargs)
        if model.speculation.k is None:
            outputs[-1].token_ids[-1] += 1
        return outputs

    monkeypatch.setattr(GenARM, "generate", other)
    options = ["--batch", "2", "--new-tokens", "4", "--rounds", "1"]
    found = json.loads(cli("bench", *models.options, *options, "--json").out)["results"][0]["drafts"]
    assert (found["texts"], found["same_texts"]) == (4, 2)
    assert "WITH DRAFTS 2 of 4 texts are other tokens" in " ".join(cli("bench", *models.options, *options).out.split())


def test_adapters_of_the_base_are_shown_to_share_its_forward(cli: Callable, models: Any, tmp_path: Path) -> None:
    save_adapter(tmp_path / "lora", base=models.base, seed=3)
    options = ["--base", models.base, "--arm", tmp_path / "lora", "--arm", models.arm, "--batch", "1"]
    options += ["--new-tokens", "2", "--rounds", "1"]
    found = json.loads(cli("bench", *options, "--json").out)
    assert found["about"]["forwards"] == [["base", "lora"], ["arm"]]
    assert "forwards: base + lora in one; arm" in cli("bench", *options).out


def test_a_missing_core_is_told(cli: Callable, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*models.options, "--batch", "1", "--new-tokens", "2", "--rounds", "1"]
    monkeypatch.setattr("genarm_fast.kernels._native.core", None)
    assert "WITHOUT THE C++ CORE" in cli("bench", *options).out
    assert json.loads(cli("bench", *options, "--json").out)["about"]["cpp_core"] is False


def test_prompts_come_from_where_they_are_said_to(cli: Callable, models: Any, calls: Calls, tmp_path: Path) -> None:
    options = [*models.options, "--batch", "2", "--new-tokens", "2", "--rounds", "1", "--json"]
    cli("bench", *options, "--prompt", "the cat", "--raw")
    assert calls.prompts["guided"] == [["the cat"] * 2] * 2
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": [5, 6, 7], "id": "x"}, {"prompt": "c"}]
    calls.prompts.clear()
    assert cli("bench", *options, "--input", write_lines(tmp_path / "in.jsonl", rows), "--raw").code == 0
    assert calls.prompts["guided"] == [["a", [5, 6, 7]], ["c", "a"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "x"], "--arm: expected at least one"),
        (["--base", "x", "--arm", "y=0"], "--arm y=0: expected another weight"),
        (["--base", "x", "--arm", "y", "--batch", "0"], "'0': expected an integer >= 1"),
        (["--base", "x", "--arm", "y", "--rounds", "two"], "'two': expected an integer >= 1"),
        (["--base", "x", "--arm", "y", "--new-tokens", "-3"], "'-3': expected an integer >= 1"),
        (["--base", "x", "--arm", "y", "--prompt", "a", "--input", "f"], "--input f: expected no --prompt"),
        (["--base", "x", "--arm", "y", "--input", "/no/such/file"], "/no/such/file"),
        (["--base", "x", "--arm", "y", "--speculation", "off"], "unrecognized arguments: --speculation"),
        (["--base", "./no/such/model", "--arm", "y"], "./no/such/model: expected a model's folder"),
    ],
)
def test_bad_arguments_are_named(cli: Callable, options: list[str], message: str) -> None:
    result = cli("bench", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 5}, "line 2: prompt=5: expected text, chat messages or token ids"),
        ({"text": "a"}, "line 2: prompt=None: expected text"),
        ({"prompt": [1, 900]}, "line 2: prompts[0]: token ids 1..900"),
        ({"prompt": ""}, "line 2: prompt: expected text, got none"),
        ({"prompt": "a " * 600}, "line 2: prompts[0]: "),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(
    cli: Callable, models: Any, calls: Calls, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, row])
    result = cli("bench", *models.options, *QUICK, "--input", path)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not calls.shapes
    assert not calls.texts
