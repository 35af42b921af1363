"""Preference pairs: halves and splits share nothing, and lengths are equal or clearly different."""

import json
import random

import pairs_concise
import pairs_harmless
import pytest
from pairs_positive import Passage, is_plain, match, sentences, windows
from preference import write_jsonl
from reviews import Review, clean, load


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text):
        one = [text] if isinstance(text, str) else text
        ids = [list(range(len(t.split()))) for t in one]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


class Spelled:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text):
        return {"input_ids": list(text) if isinstance(text, str) else [list(t) for t in text]}

    def decode(self, ids):
        return "".join(ids)


def test_reposted_reviews_land_in_one_half_and_count_once(tmp_path):
    rows = [f'"Film {i} is<br /><br />great",1,imdb' for i in range(40)] + ['"FILM 3  is great",1,imdb']
    (path := tmp_path / "reviews.csv").write_text("text,label,source\n" + "\n".join(rows) + "\n")
    reviews = load(path)
    assert len(reviews) == 40
    assert {r.half for r in reviews} == {"arm", "judge"}
    assert Review("A film", True, "imdb").half == Review("a  FILM", False, "x").half
    assert clean("So &amp; so.<br />Yes") == "So & so. Yes"


def test_windows_are_all_runs_within_the_limits():
    lengths = [3, 4, 5, 20, 2]
    expected = {(a, b) for a in range(5) for b in range(a + 1, 6) if 7 <= sum(lengths[a:b]) <= 12}
    assert set(windows(lengths, 7, 12)) == expected == {(0, 2), (0, 3), (1, 3)}


def test_sentences_join_to_the_text():
    text = "Good film. It was 3.5 hours! Really? yes."
    assert " ".join(sentences(text)) == text
    assert sentences(text)[1:] == ["It was 3.5 hours!", "Really? yes."]
    assert is_plain("Good film, really.")
    assert not is_plain("8/10 for me.")
    assert not is_plain("WORST film.")


def test_matched_passages_have_equal_length_and_occur_once():
    rng = random.Random(0)
    items = [Passage(str(i), bool(rng.randrange(2)), rng.randrange(20, 30), 1.0) for i in range(200)]
    pairs = match(items)
    assert len(pairs) > 60
    assert all(good.positive and not bad.positive and good.tokens == bad.tokens for good, bad in pairs)
    texts = [p.text for pair in pairs for p in pair]
    assert len(texts) == len(set(texts))


def test_openings_end_where_sentences_end():
    assert pairs_concise.openings("Boil it. Then:\n1. Salt it.\n2. Stir for 2.5 minutes. And so") == [
        "Boil it.",
        "Boil it. Then:\n1. Salt it.",
        "Boil it. Then:\n1. Salt it.\n2. Stir for 2.5 minutes.",
    ]


def test_the_rejected_answer_goes_on_where_the_chosen_one_ends():
    answer = "Yes. One two three four. Five six. Seven eight nine. Cut off here"
    chosen, rejected = pairs_concise.pair(answer, Words(), low=4, high=8, more=4)
    assert (chosen, rejected) == ("Yes. One two three four.", "Yes. One two three four. Five six. Seven eight nine.")
    assert pairs_concise.pair(answer, Words(), low=4, high=8, more=6) is None
    assert pairs_concise.pair("Never ends", Words(), low=1, high=8, more=1) is None


def test_last_turns_keeps_as_many_as_fit():
    turns = [{"role": role, "content": "a b c"} for role in ("user", "assistant", "user", "assistant", "user")]
    assert [len(pairs_harmless.last_turns(turns, Words(), n)) for n in (15, 14, 9, 8, 2)] == [5, 3, 3, 1, 0]


def test_every_fifth_line_of_hh_is_held_out(tmp_path):
    lines = [{k: f"\n\nHuman: {i}?\n\nAssistant: {i}, {k}" for k in ("chosen", "rejected")} for i in range(23)]
    (path := tmp_path / "hh.jsonl").write_text("\n".join(map(json.dumps, lines)))
    training, held_out = pairs_harmless.split([path], Spelled(), 10, 20)
    assert [int(p["chosen"].split(",")[0]) for p in held_out] == [0, 5, 10, 15, 20]
    assert len(training) == 18
    assert not {p["chosen"] for p in training} & {p["chosen"] for p in held_out}
    twice = pairs_harmless.split([path, path], Spelled(), 10, 20)
    assert twice == (2 * training, 2 * held_out), "each file is held out by its own lines"


def test_helpful_pairs_are_all_that_fit(tmp_path, monkeypatch):
    lines = [{k: f"\n\nHuman: {i}?\n\nAssistant: {i}, {k}" for k in ("chosen", "rejected")} for i in range(10)]
    (path := tmp_path / "hh.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(pairs_harmless.AutoTokenizer, "from_pretrained", lambda *_, **__: Spelled())
    monkeypatch.setattr("sys.argv", ["pairs_helpful.py", str(path), str(tmp_path / "pairs"), "--base", "any"])
    pairs_harmless.main("helpful", None, None)
    rows = {file.stem: len(file.read_text().splitlines()) for file in (tmp_path / "pairs").iterdir()}
    assert rows == {"helpful": 8, "helpful-held-out": 2, "helpful-held-out-whole": 2}


def test_harmless_responses_are_cut_to_equal_length_and_do_not_end():
    assert pairs_harmless.cut(["I cannot", "Sure thing"], Spelled(), 20) == (["I cannot", "Sure thi"], 8)
    assert pairs_harmless.cut(["I cannot", "Sure thing"], Spelled(), 4) == (["I ca", "Sure"], 4)


def test_pairs_too_short_or_equal_after_the_cut_are_left_out(tmp_path):
    answers = [
        ("No.", "Sure, here is how"),
        ("I would rather not", "I would rather not, friend"),
        ("Sorry, no", "Sure: do"),
    ]
    lines = [
        {"chosen": f"\n\nHuman: q\n\nAssistant: {chosen}", "rejected": f"\n\nHuman: q\n\nAssistant: {rejected}"}
        for chosen, rejected in [("x", "y"), *answers]  # the first line is held out
    ]
    (path := tmp_path / "hh.jsonl").write_text("\n".join(map(json.dumps, lines)))
    training, held_out = pairs_harmless.split([path], Spelled(), 10, 30)
    assert held_out == []
    assert [(p["chosen"], p["rejected"]) for p in training] == [("Sorry, n", "Sure: do")]
    assert not training[0]["chosen_complete"]
    assert not training[0]["rejected_complete"]


def test_the_clearest_pairs_are_those_whose_words_agree_with_others():
    rng = random.Random(0)

    def text(word: str) -> str:
        return " ".join([word, *rng.choices(["one", "two", "three", "four"], k=5)])

    usual = [{"chosen": text("sorry"), "rejected": text("sure")} for _ in range(40)]
    odd = [{"chosen": text("sure"), "rejected": text("sorry")} for _ in range(10)]
    vague = [{"chosen": text(""), "rejected": text("")} for _ in range(10)]
    order = pairs_harmless.clearest([*odd, *vague, *usual], 60)
    assert sum(pair in usual for pair in order[:40]) >= 35
    assert sum(pair in odd for pair in order[50:]) >= 8


def test_write_jsonl_leaves_whole_files_only(tmp_path):
    def broken():
        yield {"a": 1}
        raise RuntimeError

    write_jsonl(path := tmp_path / "x" / "pairs.jsonl", [{"a": "é"}, {"a": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": "é"}, {"a": 2}]
    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert len(path.read_text().splitlines()) == 2
