"""`genarm-fast chat` on tiny models: turns, commands, interruption."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.cli.chat import ChatSession
from genarm_fast.engine.stream import Stream

PARAMS = SamplingParams(max_new_tokens=10, seed=7)


@pytest.fixture(scope="module")
def model(models: Any) -> GenARM:
    arms = [ARM(models.arm, weight=1.5, name="one"), ARM(models.base, weight=-0.25, name="two")]
    return GenARM.from_pretrained(models.base, arms)


@pytest.fixture
def talk(cli: Callable, models: Any, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """talk("a message", "/a command", ...): returns exit code, stdout, stderr of a chat whose stdin is a pipe."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", *models.options, "--max-new-tokens", "10", "--seed", "7", *options)

    return run


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def answer(model: GenARM, *messages: dict[str, str], **overrides: Any) -> str:
    return model.generate([list(messages)], PARAMS, **overrides)[0].text


def test_each_turn_sees_the_ones_before(talk: Callable, model: GenARM) -> None:
    first = answer(model, user("the cat"))
    second = answer(model, user("the cat"), assistant(first), user("and then"))
    assert talk("the cat", "", "and then")[:2] == (0, f"{first}\n{second}\n")


def test_lines_as_windows_ends_them(talk: Callable, model: GenARM) -> None:
    """Line ends and byte order marks of Windows are no part of a message or a command."""
    lines = ["\ufeff/weights 0.5 -1\r", "the cat\r", "/reset\r", "hello\r", "/quit\r", "more\r"]
    texts = [answer(model, user(text), weights=[0.5, -1.0]) for text in ("the cat", "hello")]
    assert talk(*lines)[:2] == (0, "".join(text + "\n" for text in texts))


def test_quit_ends_it(talk: Callable, model: GenARM) -> None:
    assert talk("/quit", "the cat")[:2] == (0, "")


def test_commands_change_the_next_answers(talk: Callable, model: GenARM) -> None:
    result = talk("/weights 0.5 -1", "/temperature 0.5", "/top_k 20", "the cat", "/reset", "/weights none", "hello")
    first = answer(model, user("the cat"), weights=[0.5, -1.0], temperature=0.5, top_k=20)
    second = answer(model, user("hello"), temperature=0.5, top_k=20)
    assert result.out == f"{first}\n{second}\n"
    assert result.err.splitlines()[:3] == ["weights: one=0.5, two=-1", "temperature: 0.5", "top_k: 20"]
    assert "weights: one=1.5, two=-0.25" in result.err


def test_system_messages_start_over(talk: Callable, model: GenARM) -> None:
    told = {"role": "system", "content": "be brief"}
    assert talk("x", "/system be brief", "hi").out.endswith(f"\n{answer(model, told, user('hi'))}\n")
    assert talk("hi", options=("--system", "be brief")).out == f"{answer(model, told, user('hi'))}\n"
    assert talk("/system", "hi", options=("--system", "be brief")).out == f"{answer(model, user('hi'))}\n"


def test_retry_answers_the_last_message_again(talk: Callable, model: GenARM) -> None:
    first, again = answer(model, user("hi")), answer(model, user("hi"), seed=8)
    third = answer(model, user("hi"), assistant(again), user("so"), seed=8)
    assert talk("hi", "/seed 8", "/retry", "so").out == f"{first}\n{again}\n{third}\n"
    assert "/retry: expected a message before it" in talk("/retry").err


def test_rewards_are_shown_on_request(talk: Callable, model: GenARM) -> None:
    total = model.generate([[user("hi")]], PARAMS, rewards=True)[0].rewards["one"].total
    assert f"{total:.2f}" in talk("/rewards on", "hi").err
    assert f"{total:.2f}" not in talk("/rewards on", "/rewards off", "hi").err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/weights 1 2 3", "expected 2 numbers, one per ARM, got 3"),
        ("/weights x", "weights='x': expected W[,W...] or none"),
        ("/temperature -1", "temperature=-1.0: expected a finite number >= 0"),
        ("/seed x", "seed='x': expected N or none"),
        ("/rewards maybe", "rewards='maybe': expected on or off"),
        ("/logit_bias 5", "expected ID=BIAS or none"),
        ("/n 2", "/n: expected a command that /help lists"),
        ("/nonsense", "/nonsense: expected a command that /help lists"),
        ("word " * 400, "expected at most 512, the context of base"),
    ],
)
def test_mistakes_are_told_and_change_nothing(talk: Callable, model: GenARM, line: str, message: str) -> None:
    result = talk(line, "the cat")
    assert message in " ".join(result.err.split())
    assert (result.code, result.out) == (0, answer(model, user("the cat")) + "\n")


def test_parameters_of_every_kind_can_be_set_and_shown(talk: Callable, model: GenARM) -> None:
    result = talk("/stop the mat", "/stop_token_ids 40 41", "/logit_bias 42=3 43=-inf", "/stop none", "/stop", "/help")
    lines = result.err.splitlines()
    assert lines[:3] == ["stop: ('the mat',)", "stop_token_ids: (40, 41)", "logit_bias: {42: 3.0, 43: -inf}"]
    assert lines[3:5] == ["stop: ()", "stop: ()"]
    assert "/weights W" in result.err


def test_an_interrupt_keeps_the_beginning_of_the_answer(
    model: GenARM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = answer(model, user("the cat"))
    chat = ChatSession(model, PARAMS, None)
    advance = Stream.__next__

    def interrupted(self: Stream) -> Any:
        if len(self._sequences[0].tokens) == 4:
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "__next__", interrupted)
        chat.take("the cat")
    captured = capsys.readouterr()
    assert "cancelled after 4 tokens" in captured.err
    text = captured.out.removesuffix("\n")
    assert text
    assert whole.startswith(text)
    assert chat.messages == [user("the cat"), assistant(text)]
    chat.take("/retry")
    assert chat.messages == [user("the cat"), assistant(whole)]


def test_a_model_without_chat_template_is_refused(cli: Callable, models: Any, tmp_path: Any) -> None:
    (tmp_path / "bare").mkdir()
    for path in models.base.iterdir():
        if path.suffix != ".jinja":
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    result = cli("chat", "--base", tmp_path / "bare")
    assert result.code == 2
    assert "base: expected a model with a chat template, or --chat-template" in result.err
