"""Messages that a table stores as text (CSV, SQL): training reads them, prompts refuse them; other texts stay texts."""

from __future__ import annotations

import json

import numpy
import pytest

from genarm_fast.cli import main
from genarm_fast.jobs import read_requests
from genarm_fast.params import SamplingParams
from genarm_fast.text.given import as_prompts, as_responses
from genarm_fast.text.messages import as_message, stored_messages
from genarm_fast.train.data import load_pairs

USER = {"role": "user", "content": "is the sea \"blue\", or 'grey'?\n"}
YES, NO = {"role": "assistant", "content": "it is"}, {"role": "assistant", "content": "no"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
CHATS = [[USER], [USER, YES], [USER, CALL], [YES]]
FORMS = {
    "JSON": json.dumps,
    "indented JSON": lambda value: f"\n{json.dumps(value, indent=2, ensure_ascii=False)}\n",
    "Python": str,  # pandas writes lists into CSV like this
    "a message alone": lambda value: json.dumps(value[0]) if len(value) == 1 else json.dumps(value),
    "a conversation": lambda value: json.dumps({"messages": value}),
}
PLAIN = [
    "[INST] is the sea blue? [/INST]",
    "[1, 2, 3]",
    '["user", "hi"]',
    '[{"name": "Ann", "role": "engineer"}]',
    '{"role": "engineer", "name": "Ann"}',
    '[{"from": "ann@example.org", "value": 3}]',
    '{"messages": [], "role": 3}',
    json.dumps([USER]) + "\nSummarise this chat.",
    json.dumps([USER])[:-2],  # an incomplete list
    str([USER])[:-9],
    "[{'role'",
    '[{"' * 100_000,
    "[]",
    "{}",
]


def table(form, **row):
    return {name: FORMS[form](value) for name, value in row.items()}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_read_as_if_the_table_had_lists(form):
    rows = [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": [CALL], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ]
    for row in rows:
        expected = load_pairs([row])
        found = load_pairs([table(form, **row)])
        assert (found.format, found.pairs) == (expected.format, expected.pairs) == ("messages", expected.pairs)


def test_one_column_of_three():
    expected = load_pairs([{"prompt": [USER], "chosen": "it is", "rejected": "no"}]).pairs
    assert load_pairs([{"prompt": json.dumps([USER]), "chosen": "it is", "rejected": "no"}]).pairs == expected
    row = {"prompt": USER["content"], **table("JSON", chosen=[YES], rejected=[NO])}
    assert load_pairs([row]).pairs == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": json.dumps([YES]), "rejected": "no"}, "'chosen': the text of messages beside a plain 'rejected'"),
        ({"chosen": "yes", "rejected": str([NO])}, "'rejected': the text of messages beside a plain 'chosen'"),
        ({"chosen": str(numpy.array([USER, YES])), "rejected": "no"}, "'chosen': .*NumPy printed these without commas"),
        (table("JSON", chosen=[{"from": "gpt", "value": "a"}], rejected=[{"from": "gpt", "value": "b"}]), "'role' and"),
        (
            {"chosen": json.dumps({"messages": [YES], "n": 1}), "rejected": json.dumps([NO])},
            "keys 'role' and 'content'",
        ),
    ],
)
def test_what_training_cannot_read_is_refused(row, said):
    with pytest.raises(ValueError, match=f"data line 1: field .*{said}"):
        load_pairs([{"prompt": "p", **row}])


def test_a_text_among_texts_is_no_chat():
    """One text of messages in a data set of texts is an error, not a change of the format half-way."""
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": str([USER]), "chosen": "a", "rejected": "b"}]
    with pytest.raises(ValueError, match="data line 2: expected the format 'text' of the first line, got 'messages'"):
        load_pairs(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chat", CHATS)
def test_as_prompts_and_responses_they_are_refused(form, chat, tmp_path):
    text = FORMS[form](chat)
    said = r"expected a text, or messages as a list, not as the JSON or Python text of one \(json.loads and"
    for given in (text, [text], {"prompt": text}, ["a", text]):
        with pytest.raises(ValueError, match=rf"prompts\[\d\]=.*: {said}"):
            as_prompts(given)
    with pytest.raises(ValueError, match=rf"responses\[0\]=.*: {said}"):
        as_responses([text], 1)
    openai = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": text}}
    for line in ({"prompt": text}, {"prompt": text, "tools": None}, openai):
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=rf"in\.jsonl line 2: .*{said}"):
            read_requests(tmp_path / "in.jsonl", SamplingParams(), arms=0)


def test_the_array_that_numpy_prints():
    with pytest.raises(ValueError, match=r"prompts\[0\]=.*: expected a text, or messages as a list"):
        as_prompts(str(numpy.array([USER, YES])))


@pytest.mark.parametrize("text", PLAIN, ids=lambda text: text[:20])
def test_texts_that_only_begin_so(text, tmp_path):
    assert stored_messages(text) is None
    assert as_prompts(text) == [text]
    assert as_responses(text, 1) == [text]
    (pair,) = load_pairs([{"prompt": text, "chosen": text + "a", "rejected": text + "b"}]).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (text, text + "a", text + "b")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    assert read_requests(tmp_path / "in.jsonl", SamplingParams(), arms=0)[0].prompt == text


def test_inside_a_message_it_is_what_somebody_said():
    said = [{"role": "user", "content": json.dumps([USER])}]
    assert as_prompts(said) == [said]


def test_the_command(trained_nothing, capsys):
    for command in (["generate", json.dumps([USER])], ["score", "--prompt", json.dumps([USER]), "--response", "a"]):
        assert main([command[0], "--base", trained_nothing, *command[1:]]) == 2
        assert "expected a text, or messages as a list" in capsys.readouterr().err


@pytest.fixture
def trained_nothing(tmp_path, tiny_model, tokenizer):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("calls", ['[{"function": {}}]', ["look"], {"function": {}}, numpy.array([{}, {}])])
def test_calls_that_are_no_list_of_calls(calls):
    """A template would render the characters of a text, or nothing."""
    with pytest.raises(TypeError, match="expected a list of calls as 'tool_calls', got"):
        as_message({"role": "assistant", "content": None, "tool_calls": calls})


def test_rows_of_pandas():
    """Lists in a Parquet table come as arrays, at any depth."""
    message = {"role": "user", "content": numpy.array([{"type": "text", "text": "is it?"}], dtype=object)}
    call = {**CALL, "tool_calls": numpy.array(CALL["tool_calls"] * 2, dtype=object)}
    row = {"prompt": numpy.array([message]), "chosen": numpy.array([call]), "rejected": numpy.array([NO])}
    plain = {"prompt": [{"role": "user", "content": "is it?"}], "rejected": [NO]}
    plain["chosen"] = [{**CALL, "tool_calls": CALL["tool_calls"] * 2}]
    assert load_pairs([row]).pairs == load_pairs([plain]).pairs
