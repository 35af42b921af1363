"""Judges and statistics: a judge sees only its own half, and intervals have the coverage they claim."""

import json
import sys
from pathlib import Path

import evaluate
import judge
import numpy as np
import pytest
from judge import PreferenceJudge, SentimentJudge, caution, judge_halves, preference_judges, repetition, vader
from report import Results, bootstrap
from reviews import Review
from test_pairs import Spelled


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


def test_the_preference_judge_is_measured_on_the_pairs_that_it_is_given():
    learnt = [(f"{i} sorry", f"{i} sure") for i in range(20)]
    judge = PreferenceJudge(learnt, [("so sorry", "yes, sure")] * 3 + [("sure", "sorry")])
    assert judge.accuracy == 0.75
    apart = judge(["sorry"])[0] - judge(["sure"])[0]
    assert judge.margins == pytest.approx([apart] * 3 + [-apart])
    weak, usual = (PreferenceJudge(learnt, strength=strength)(["sorry"])[0] for strength in (0.01, 1.0))
    assert 0 < weak < usual / 2


def test_judges_of_people_s_choices_see_no_pair_that_an_arm_was_trained_on(tmp_path, monkeypatch):
    seen = {}

    def noted(pairs, held_out=None, strength=1.0):
        seen[strength] = pairs, held_out

    def lines(name: str, openings: range) -> Path:
        rows = [{k: f"\n\nHuman: {i}?\n\nAssistant: {name}{i} {k}" for k in ("chosen", "rejected")} for i in openings]
        (path := tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return path

    monkeypatch.setattr(judge, "PreferenceJudge", noted)
    monkeypatch.setattr(judge, "AutoTokenizer", type("Auto", (), {"from_pretrained": lambda *_, **__: Spelled()}))
    base, other = lines("base", range(10)), lines("other", range(4, 12))
    assert preference_judges(None, base, None) == {}, "no other kinds, no judge"
    assert set(preference_judges(lines("harm", range(11)), base, [other])) == {"harmless", "helpful"}
    assert [chosen.strip() for chosen, _ in seen[1.0][0]] == ["harm0 chosen", "harm5 chosen", "harm10 chosen"]
    # The openings 4 and 6 to 9 are training lines of `base`; 5 is held out there, and `base` has no 10 and 11.
    learnt = [(f"other{i} chosen", f"other{i} reject") for i in (5, 10, 11)]
    assert seen[0.1][0] == learnt
    assert seen[0.1][1] == [("base0 chosen", "base0 reject"), ("base5 chosen", "base5 reject")]


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
    results = Results(tmp_path, SentimentJudge(make_reviews()), {})
    assert results.samples == {"base": 20, "positive-1": 20}
    tokens = results.estimate("positive-1", "tokens", against="base")
    assert (tokens.mean, tokens.low, tokens.high) == (0, 0, 0)  # an interval of unpaired samples would be wide
    assert results.estimate("positive-1", "tokens").high > 10
    assert results.estimate("positive-1", "vader", against="base").low > 0.3
    table = results.table(["base", "self-1", "positive-1"], [("Δ", "tokens", "base", 1)])
    assert table.splitlines()[2:] == ["| base |  |", "| `positive`, w = 1 | +0.0 [+0.0, +0.0] |"]


def test_each_objective_has_its_own_word_judge(tmp_path):
    for name in ("hh-base", "helpful-base", "base"):
        samples = [{"prompt": "1", "text": "a word", "tokens": 2, "finish_reason": "stop"}]
        (tmp_path / f"{name}-0.json").write_text(json.dumps({"condition": name, "seed": 0, "samples": samples}))
    judges = {"harmless": lambda texts: np.full(len(texts), 1.0), "helpful": lambda texts: np.full(len(texts), 2.0)}
    values = Results(tmp_path, SentimentJudge(make_reviews()), judges).values
    assert {name: float(row["preference"][0]) for name, row in values.items() if "preference" in row} == {
        "hh-base": 1.0,
        "helpful-base": 2.0,
    }


def test_the_evaluation_has_a_help_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        evaluate.main()
    assert "lines number % 5 == 0" in " ".join(capsys.readouterr().out.split())
