"""The quality tables on a tiny model: what runs, what is kept, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from genarm_fast import GenARM

PROMPTS = [[2, 3], [4, 5, 6], [7]]


class Judge:
    """A judge to whom longer texts are better."""

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.array([float(len(text)) for text in texts])


@pytest.fixture
def quality(script, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script("quality_measures"), "RESAMPLES", 200)
    return script("quality")


@pytest.fixture
def models(script, tiny_model, tokenizer) -> SimpleNamespace:
    engine = GenARM.from_pretrained(tiny_model(), [tiny_model(seed=1)], tokenizer=tokenizer)
    return SimpleNamespace(engine=engine, base=script("baselines.interface").Member("base", engine.base.model))


@pytest.fixture
def size(script):
    from dataclasses import replace

    return replace(script("quality_methods").SIZES["quick"], prompts=3, tokens=5, seeds=2, points=3)


def methods_of(script, models, asked: list[str]):
    guided = script("baselines.guided").guided

    def method(name: str, weight: float):
        def run(prompts, params):
            asked.append(name)
            return guided(models.engine, [weight], prompts, params)

        return run

    return {"base": method("base", 0.0), "guided, w = 1": method("guided", 1.0)}


def test_runs_are_kept_and_told(quality, script, models, size, tmp_path: Path) -> None:
    asked: list[str] = []
    methods = methods_of(script, models, asked)
    found = quality.collect(models, methods, tmp_path, PROMPTS, size)
    assert asked == ["base", "base", "guided", "guided"]  # one call per seed
    again = quality.collect(models, methods, tmp_path, PROMPTS, size)
    assert len(asked) == 4
    assert again["base"].texts == found["base"].texts
    for texts in found.values():
        assert texts.tokens.shape == texts.nats.shape == (3, 2)
    assert found["base"].forwards == {"base": 1.0}
    assert len(found["guided, w = 1"].forwards) == 2

    # A text's perplexity comes from the base's own log-probability of the sampled text.
    texts = json.loads((tmp_path / "guided, w = 1.json").read_text())["samples"]
    (guided,) = script("baselines.guided").guided(
        models.engine,
        [1.0],
        PROMPTS[1:2],
        script("baselines.interface").Params(5, 1.0, 1, tuple(models.engine.eos_token_ids)),
    )
    assert texts[1]["text"] == models.engine.tokenizer.decode(guided.tokens, skip_special_tokens=True)
    (score,) = models.engine.score(PROMPTS[1:2], [guided.tokens])
    assert texts[1]["base_nats"] == pytest.approx(sum(score.base_logprobs), abs=1e-4)

    row = quality.described(found["guided, w = 1"], Judge(), found["base"])
    lengths = [np.array([len(t) for t in found[name].texts]).reshape(2, 3).T for name in found]
    wins = ((lengths[1] > lengths[0]) + (lengths[1] == lengths[0]) / 2).mean()
    assert row["win_rate"]["value"] == pytest.approx(wins)
    assert quality.described(found["base"], Judge(), found["base"])["win_rate"]["value"] == 0.5
    table = quality.table({"scenario": "general", "prompts": 3, "methods": {"base": row, "guided": row}})
    assert table.count("\n") == 3
    assert "prompts)" not in table
    assert f"{wins:.2f} [" in table


def test_a_method_of_the_first_prompts_only(quality, script, models, size, tmp_path: Path) -> None:
    """The method is compared with the base on these prompts, text by text, and its row says so."""
    methods = methods_of(script, models, [])
    few = script("quality_methods").FirstPrompts(methods["guided, w = 1"], 2)
    found = quality.collect(models, methods | {"few": few}, tmp_path, PROMPTS, size)
    assert found["few"].tokens.tolist() == found["guided, w = 1"].tokens[:2].tolist()
    assert found["few"].nats == pytest.approx(found["guided, w = 1"].nats[:2])
    row = quality.described(found["few"], Judge(), found["base"])
    lengths = [np.array([len(t) for t in found[name].texts]).reshape(2, 3).T[:2] for name in ("guided, w = 1", "base")]
    wins = ((lengths[0] > lengths[1]) + (lengths[0] == lengths[1]) / 2).mean()
    assert row["win_rate"]["value"] == pytest.approx(wins)
    assert "| few (2 prompts) |" in quality.table({"scenario": "general", "prompts": 3, "methods": {"few": row}})


def test_wins_over_the_policy(quality, script, models, size, tmp_path: Path) -> None:
    """A method on two of three prompts is compared with the policy's texts on the same prompts, by hand."""
    methods = methods_of(script, models, [])
    methods["policy"] = methods["guided, w = 1"]
    methods["few"] = script("quality_methods").FirstPrompts(methods["base"], 2)
    found = quality.collect(models, methods, tmp_path, PROMPTS, size)
    rows: dict = {name: {} for name in found}
    quality.add_duels(rows, found, Judge())
    assert rows["policy"] == {}
    ours, theirs = (np.array([len(text) for text in found[name].texts]) for name in ("few", "policy"))
    theirs = theirs.reshape(2, 3)[:, :2].reshape(-1)
    assert rows["few"]["over_policy"]["value"] == pytest.approx(((ours > theirs) + (ours == theirs) / 2).mean())
    assert rows["guided, w = 1"]["vader_over_policy"]["value"] == 0.5  # the same texts
    quality.add_duels({}, {"base": found["base"]}, Judge())  # without a policy there is no column


def test_other_inputs_are_refused(quality, tmp_path: Path) -> None:
    """New inputs are added to the note, and a run without them loses nothing of it."""
    given = {"size": {"prompts": 3}, "adapters": {"reward": None, "positive": "ab"}}

    def other(**adapters: str) -> dict:
        return given | {"adapters": given["adapters"] | adapters}

    quality.same_inputs(tmp_path, given)
    quality.same_inputs(tmp_path, given)
    quality.same_inputs(tmp_path, other(rewarded="cd"))
    quality.same_inputs(tmp_path, given)
    with pytest.raises(SystemExit, match="made with another size: expected another --runs"):
        quality.same_inputs(tmp_path, given | {"size": {"prompts": 4}})
    with pytest.raises(SystemExit, match="made with another positive, rewarded: expected another --runs"):
        quality.same_inputs(tmp_path, other(rewarded="ef", positive="cd"))
    assert json.loads((tmp_path / "inputs.note").read_text()) == other(rewarded="cd")


def test_the_inputs_are_all_weights(script, tmp_path: Path) -> None:
    methods = script("quality_methods")
    found = methods.Models({}, None).inputs()
    assert found["reward"] is None
    assert {f"ARM {name}" for name in methods.ARMS} <= set(found)
    assert found["ARM positive"] == found["positive"] != found["ARM concise"]
    with pytest.raises(SystemExit, match=r"expected weights in \*.safetensors, found none"):
        methods.Models({"positive": tmp_path}, None).inputs()


def test_policies(quality, tmp_path: Path) -> None:
    assert quality.policies([f"positive={tmp_path}"]) == {"positive": tmp_path}
    for wrong in ("positive", f"kind={tmp_path}", "positive=/nowhere/at/all"):
        with pytest.raises(SystemExit, match="expected OBJECTIVE=FOLDER"):
            quality.policies([wrong])


def test_methods_of_the_scenarios(script) -> None:
    """Asking for the names alone loads nothing."""
    methods = script("quality_methods")
    models, size = methods.Models({}, methods.REWARD), methods.SIZES["full"]
    names = set(methods.general(models, size))
    assert {"base", "control, w = 1", "best of 2", "best of 16", "ARGS, sampling, w = 3", "Transfer-Q, w = 10"} <= names
    assert not any("best of" in name for name in methods.general(methods.Models({}, None), size))
    assert "rewarded fine-tune" not in names
    assert {"base", "small ARM, w = 1", "guided, w = 1", "policy"} <= set(methods.weak(models))
    assert len(methods.fronts(models, size.points)) == 44


def test_a_rewarded_fine_tune_is_a_row_and_an_input(script) -> None:
    methods = script("quality_methods")
    folder = methods.demo.arm("positive")
    models, without = methods.Models({}, None, folder), methods.Models({}, None)
    size = methods.SIZES["quick"]
    assert set(methods.general(models, size)) - set(methods.general(without, size)) == {"rewarded fine-tune"}
    assert models.inputs() == without.inputs() | {"rewarded": models.inputs()["positive"]}
    row = methods.general(models, size)["rewarded fine-tune"]
    assert row(PROMPTS, script("baselines.interface").Params(2))[0].forwards == {"rewarded": 2}


def test_a_rewarded_folder_that_is_not_there(quality, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["quality.py", "general", "--rewarded", "/nowhere/at/all"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--rewarded /nowhere/at/all: expected a folder that baselines/rewarded.py wrote" in capsys.readouterr().err


def test_points_of_a_front(quality, script, tmp_path: Path) -> None:
    """A point is named by a share of the front; its row runs the named adapter."""
    methods = script("quality_methods")
    size = methods.SIZES["short"]
    assert quality.point_folders([f"0.50={tmp_path}", f"0.30={tmp_path}"], size) == {0.5: tmp_path, 0.3: tmp_path}
    for wrong in ("0.5", "0.55=" + str(tmp_path), "0.50=/nowhere/at/all", f"half={tmp_path}"):
        with pytest.raises(SystemExit, match=r"expected SHARE=FOLDER, a share of 0.00, 0.10, .*, 1.00"):
            quality.point_folders([wrong], size)
    models = methods.Models({}, None, points={0.5: methods.demo.arm("concise")})
    found = methods.fronts(models, 3)
    assert set(found) - set(methods.fronts(methods.Models({}, None), 3)) == {"trained for the point 0.50"}
    assert models.inputs()["trained for the point 0.50"] == models.inputs()["concise"]
    params = script("baselines.interface").Params(3)
    prompts = [[504, 216, 2683], [1031, 28, 96]]
    ours, alone = found["trained for the point 0.50"](prompts, params), found["MOD 0.00"](prompts, params)
    assert [each.tokens for each in ours] == [each.tokens for each in alone]
    assert [each.tokens for each in ours] != [each.tokens for each in found["MOD 1.00"](prompts, params)]
