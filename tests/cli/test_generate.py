"""`genarm-fast generate` on tiny models: text, JSON, prompts from everywhere."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.cli.options import add_sampling_arguments
from genarm_fast.text.detokenize import token_text

CHAT = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def model(models: Any) -> GenARM:
    """The model that the command line loads."""
    arms = [ARM(models.arm, weight=1.5, name="one"), ARM(models.base, weight=-0.25, name="two")]
    return GenARM.from_pretrained(models.base, arms)


@pytest.fixture
def options(models: Any) -> list[str]:
    return [*models.options, "--max-new-tokens", "12", "--seed", "7"]


def test_text_is_the_api_s_text_and_nothing_else(cli: Callable, options: list[str], model: GenARM) -> None:
    expected = model.generate([CHAT], SamplingParams(max_new_tokens=12, seed=7))[0].text
    assert cli("generate", "the cat", *options) == (0, expected + "\n", "")
    assert cli("generate", "the cat", *options, "--stream") == (0, expected + "\n", "")


def test_raw_prompts_and_system_messages(cli: Callable, options: list[str], model: GenARM) -> None:
    params = SamplingParams(max_new_tokens=12, seed=7)
    system = [{"role": "system", "content": "be brief"}]
    assert cli("generate", "the cat", *options, "--raw").out == model.generate("the cat", params)[0].text + "\n"
    asked = cli("generate", "the cat", *options, "--system", "be brief").out
    assert asked == model.generate([[*system, *CHAT]], params)[0].text + "\n"
    assert cli("generate", "the cat", *options, "--raw", "--system", "be brief").code == 2


def test_arguments_of_the_chat_template(cli: Callable, options: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """The arguments work in generate, chat and score. Without a chat they are an error."""
    (tmp_path / "own.jinja").write_text("{{ style }}" + tokenizer.chat_template)
    own = [*options, "--chat-template", str(tmp_path / "own.jinja")]
    brief = ["--chat-template-kwargs", '{"style": "brief"}']
    shown = [json.loads(cli("generate", "the cat", *own, *more, "--json").out) for more in ([], brief)]
    read = [tokenizer.decode(each["prompt_token_ids"]) for each in shown]
    assert read == ["<s>[user] the cat</s>[assistant] ", "brief<s>[user] the cat</s>[assistant] "]
    result = cli("generate", "the cat", *own, "--raw", *brief)
    assert (result.code, "--chat-template-kwargs {'style': 'brief'}: expected a chat" in result.err) == (2, True)
    for wrong in ("[1]", "{", "brief", '{"a": ' * 100_000, '{"style": 1, "style": 2}'):
        result = cli("generate", "the cat", *own, "--chat-template-kwargs", wrong)
        assert (result.code, "expected a JSON object" in result.err) == (2, True)
    assert "the key 'style' is there twice" in result.err


def test_tools(cli: Callable, models: Any, options: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """Tools come as a list or a file, in generate, score and batch jobs, whose lines may have their own."""
    (tmp_path / "own.jinja").write_text("{% if tools %}<{{ tools[0].name }}>{% endif %}" + tokenizer.chat_template)
    (tmp_path / "tools.json").write_text('[{"name": "look"}]')
    alone = ["--base", str(models.base), "--chat-template", str(tmp_path / "own.jinja")]
    own = [*alone, "--max-new-tokens", "12", "--seed", "7"]
    for given in (str(tmp_path / "tools.json"), ' [{"name": "look"}]'):
        shown = json.loads(cli("generate", "the cat", *own, "--tools", given, "--json").out)
        assert tokenizer.decode(shown["prompt_token_ids"]) == "<look><s>[user] the cat</s>[assistant] "
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": CHAT, "seed": 7, **own}) + "\n" for own in ({}, {"tools": [{"name": "own"}]}))
    )
    job = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert cli("generate", *own, *job, "--tools", given).code == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [cli("generate", "the cat", *own, "--tools", f'[{{"name": "{name}"}}]').out for name in ("look", "own")]
    assert [answer["completions"][0]["text"] + "\n" for answer in answers] == found
    assert found[0] != found[1]
    changed = cli("generate", *own, *job, "--tools", '[{"name": "see"}]')
    assert (changed.code, "other" in changed.err) == (2, True)

    result = cli("generate", "the cat", *own, "--raw", "--tools", given)
    assert (result.code, "--tools [{'name': 'look'}]: expected a chat" in result.err) == (2, True)
    for wrong in ('{"name": "look"}', "[1]", "[", str(tmp_path / "none.json"), str(tmp_path), "[" * 100_000):
        result = cli("generate", "the cat", *own, "--tools", wrong)
        assert (result.code, "expected a JSON list of tools" in result.err, len(result.err) < 4000) == (2, True, True)
    unread = cli("generate", "the cat", *options, "--tools", given)  # the ARMs' own templates do not read tools
    assert (unread.code, "chat template leaves them out" in unread.err) == (2, True)
    scores = [
        json.loads(cli("score", "--prompt", "the cat", "--response", "sat", *alone, "--chat", "--json", *more).out)
        for more in ([], ["--tools", given])
    ]
    assert scores[0]["base_logprobs"] != scores[1]["base_logprobs"]


def test_sampling_options_reach_the_request(cli: Callable, options: list[str], model: GenARM) -> None:
    params = SamplingParams(
        weights=(0.5, -1.0), temperature=0.7, top_k=20, top_p=0.9, stop=("e",), logprobs=2, rewards=True, n=2, seed=7,
        max_new_tokens=12, logit_bias={40: 2.0},
    )  # fmt: skip
    more = "--weights 0.5,-1 --temperature 0.7 --top-k 20 --top-p 0.9 --stop e --logprobs 2 --rewards --n 2"
    more += " --speculation off"
    result = cli("generate", "the cat", *options, *more.split(), "--logit-bias", "40=2", "--json")
    assert result.code == 0
    text = partial(token_text, model.tokenizer)
    expected = json.loads(json.dumps(model.generate([CHAT], params, speculation="off")[0].to_dict(text)))
    found = json.loads(result.out)
    del expected["timing"], found["timing"]
    assert found == expected


def test_several_completions_are_told_apart(cli: Callable, options: list[str], model: GenARM) -> None:
    texts = [c.text for c in model.generate([CHAT], SamplingParams(max_new_tokens=12, seed=7, n=2))[0].completions]
    assert cli("generate", "the cat", *options, "--n", "2").out == (
        f"--- 1 of 2 ---\n{texts[0]}\n--- 2 of 2 ---\n{texts[1]}\n"
    )


def test_rewards_and_logprobs_are_tables_beside_the_text(cli: Callable, options: list[str], model: GenARM) -> None:
    result = cli("generate", "the cat", *options, "--rewards", "--logprobs", "2")
    output = model.generate([CHAT], SamplingParams(max_new_tokens=12, seed=7, rewards=True))[0]
    assert result.out == output.text + "\n"
    assert "most probable" in result.err
    assert f"{output.rewards['one'].total:.2f}" in result.err


def test_prompts_from_a_file_and_from_stdin(
    cli: Callable, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cli("generate", "the cat", *options).out
    assert cli("generate", "", *options).code == 2
    (tmp_path / "prompt.txt").write_text("the cat\n")
    assert cli("generate", "--prompt-file", tmp_path / "prompt.txt", *options).out == expected
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    result = cli("generate", "--prompt-file", tmp_path / "latin.txt", *options)
    assert result.code == 2
    assert "latin.txt: expected UTF-8 text" in result.err
    for arguments in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
        assert cli("generate", *arguments, *options).out == expected
    (tmp_path / "windows.txt").write_bytes("\ufeffthe cat\r\n".encode())
    assert cli("generate", "--prompt-file", tmp_path / "windows.txt", *options).out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffthe cat\r\n", newline=""))
    assert cli("generate", "-", *options).out == expected


def test_templates(cli: Callable, options: list[str], models: Any, tmp_path: Path) -> None:
    params = SamplingParams(max_new_tokens=12, seed=7)
    asking = GenARM.from_pretrained(
        models.base,
        [
            ARM(models.arm, weight=1.5, prompt_template="<{prompt}>"),
            ARM(models.base, weight=-0.25, prompt_template="<{prompt}>"),
        ],
        prompt_template="Q: {prompt}",
    )
    out = cli("generate", "a", *options, "--prompt-template", "Q: {prompt}", "--arm-prompt-template", "<{prompt}>").out
    assert out == asking.generate("a", params)[0].text + "\n"
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    other = GenARM.from_pretrained(
        models.base,
        [ARM(models.arm, weight=1.5), ARM(models.base, weight=-0.25)],
        chat_template="{{ messages[0].content }}!",
    )
    out = cli("generate", "a", *options, "--chat-template", tmp_path / "chat.jinja").out
    assert out == other.generate([[{"role": "user", "content": "a"}]], params)[0].text + "\n"


def test_too_long_a_prompt_is_a_usage_error(cli: Callable, options: list[str]) -> None:
    result = cli("generate", "the cat " * 600, *options)
    assert result.code == 2
    assert "expected at most 512, the context of base" in result.err


def test_escapes_in_text_options() -> None:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    assert parser.parse_args(["--stop", r"\n\t", "--stop", r"a\\n\d"]).stop == ["\n\t", "a\\n\\d"]


def test_every_flag_can_be_set_to_what_is_not_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    flags = [field for field in fields(SamplingParams) if field.type == "bool"]
    assert {True, False} == {field.default for field in flags}
    for field in flags:
        option = f"--{'no-' * (field.default is True)}{field.name.replace('_', '-')}"
        assert getattr(parser.parse_args([option]), field.name) is not field.default


def test_help_without_docstrings() -> None:
    """PYTHONOPTIMIZE=2 strips docstrings, so the options' help is read from the source."""
    code = "import sys; from genarm_fast.cli import main; sys.exit(main(['generate', '--help']))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert (done.returncode, "keep the k most probable tokens" in " ".join(done.stdout.split())) == (0, True)


def test_foreign_code_is_asked_for_by_name(cli: Callable, models: Any) -> None:
    result = cli("generate", *models.options, "--arm-trust-remote-code", "three", "Hi")
    assert (result.code, "--arm-trust-remote-code three: expected the name or the model" in result.err) == (2, True)


def test_weights_for_each_token_and_the_text_of_tokens(cli, models):
    """`W:W:...` replaces an ARM's number, by position and by name; JSON shows each token's text."""
    run = [
        "generate",
        *models.options,
        "the cat",
        "--json",
        "--logprobs=1",
        "--seed=1",
        "--max-new-tokens=4",
        "--ignore-eos",
    ]
    by_place = json.loads(cli(*run, "--weights", "2:1:0.5,-1").out)["completions"][0]
    assert by_place["weights"] == [[2.0, -1.0], [1.0, -1.0], [0.5, -1.0], [0.5, -1.0]]
    assert all(len(entry["top_tokens"]) == 1 and isinstance(entry["token"], str) for entry in by_place["logprobs"])
    by_name = json.loads(cli(*run, "--weights", "one=2:1:0.5", "--base-weight", "0.5").out)["completions"][0]
    assert by_name["weights"] == [[w, -0.25] for w in (2.0, 1.0, 0.5, 0.5)]
    assert by_name["token_ids"] != by_place["token_ids"]
    assert "expected a finite number" in cli(*run, "--weights", "2:x").err
    assert "--keep: expected --input and --output with it" in cli(*run, "--keep", "x").err
