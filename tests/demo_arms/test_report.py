"""Judges and statistics: a judge sees only its own half, and intervals have the coverage they claim."""

import json
import sys

import evaluate
import numpy as np
import pytest
from judge import PreferenceJudge, SentimentJudge, caution, judge_halves, repetition, vader
from report import Results, bootstrap
from reviews import Review


def make_reviews(n: int = 400) -> list[Review]:
    words = {True: ["great", "lovely", "superb"], False: ["awful", "boring", "stupid"]}
    return [Review(f"Film {i} was {words[i % 2 == 0][i % 3]} and {i % 7} long", i % 2 == 0, "imdb") for i in range(n)]


def test_the_judge_sees_its_own_half_and_is_tested_on_other_reviews():
    reviews = make_reviews()
    train, test = judge_halves(reviews)
    assert not {r.text for r in train} & {r.text for r in test}
    assert {r.half for r in train + test} == {"judge"}
    assert len(train) + len(test) == sum(r.half == "judge" for r in reviews)
    judge = SentimentJudge(reviews)
    assert judge.accuracy["imdb"] > 0.95
    good, bad = judge(["a superb, lovely film", "an awful and boring one"])
    assert good > 0.7 > 0.3 > bad


def test_the_preference_judge_reports_chance_where_there_is_nothing_to_learn():
    rng = np.random.default_rng(0)

    def words(extra: str) -> str:
        return " ".join(rng.choice(["one", "two", "three", "four", "five"], 6)) + extra

    assert PreferenceJudge([(words(" sorry"), words(" sure")) for _ in range(100)]).accuracy == 1.0
    assert 0.35 < PreferenceJudge([(words(""), words("")) for _ in range(300)]).accuracy < 0.65


def test_lexicons():
    assert caution(["I’m sorry, I can’t help.", "Sure, here is how.", "That is illegal!"]).tolist() == [1, 0, 1]
    good, bad = vader(["I love it", "I hate it"])
    assert good > 0 > bad
    assert repetition(["a b c d", "a b c a b c", ""]).tolist() == [0, 0.25, 0]


def test_bootstrap_intervals_cover_the_mean_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(300):
        estimate = bootstrap(rng.exponential(2.0, 64), resamples=400, seed=i)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.89 < covered / 300 < 0.98  # the percentile interval of 64 skewed values is a little narrow
    assert bootstrap(np.full(5, 3.0)).text(1) == "3.0 [3.0, 3.0]"


def test_differences_are_taken_prompt_by_prompt(tmp_path):
    for name, suffix in (("base", ""), ("positive-1", " superb")):
        for seed in range(2):
            samples = [
                {"prompt": str(i), "text": "word " * (5 + i) + suffix, "tokens": 5 + i, "finish_reason": "length"}
                for i in range(10)
            ]
            (tmp_path / f"{name}-{seed}.json").write_text(
                json.dumps({"condition": name, "seed": seed, "samples": samples})
            )
    results = Results(tmp_path, SentimentJudge(make_reviews()), None)
    assert results.samples == {"base": 20, "positive-1": 20}
    tokens = results.estimate("positive-1", "tokens", against="base")
    assert (tokens.mean, tokens.low, tokens.high) == (0, 0, 0)  # an interval of unpaired samples would be wide
    assert results.estimate("positive-1", "tokens").high > 10
    assert results.estimate("positive-1", "vader", against="base").low > 0.3
    table = results.table(["base", "self-1", "positive-1"], [("Δ", "tokens", "base", 1)])
    assert table.splitlines()[2:] == ["| base |  |", "| `positive`, w = 1 | +0.0 [+0.0, +0.0] |"]


def test_the_evaluation_has_a_help_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        evaluate.main()
    assert "lines number % 5 == 0" in " ".join(capsys.readouterr().out.split())
