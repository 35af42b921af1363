"""`genarm-fast serve` over HTTP: completions, chat, streams, weights, refusals, metrics, many clients, a dead core."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from engines import PROMPTS, TEXTS, TOKENIZER, loaded, naive
from servers import TOKENS, Server


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(models / "small", folder / "small")
    (folder / "small" / "genarm.json").write_text('{"chat_template_kwargs": {"thinking": false}}')
    arms = [f"kind:{folder / 'small'}=0.5", f"terse:{models / 'lora1'}=-0.3"]
    with Server(models / "base", arms, folder / "server.log", "--weight-range", "-3", "3") as made:
        made.wait()
        yield made


@pytest.fixture(scope="module")
def members(models: Path) -> list[Any]:
    return [loaded(models, name) for name in ("base", "small", "lora1")]


def test_completions_are_guided(server, members):
    assert server.tokens(TEXTS[0]) == naive(members, PROMPTS[0], [0.5, -0.3], TOKENS)
    weighed = server.tokens(PROMPTS[1], vllm_xargs={"arm_weights": [2.0, 1.0]})
    assert weighed == naive(members, PROMPTS[1], [2.0, 1.0], TOKENS) != naive(members, PROMPTS[1], [1.0, 2.0], TOKENS)
    named = server.tokens(PROMPTS[1], vllm_xargs={"arm_weights.terse": 1.5})
    assert named == naive(members, PROMPTS[1], [0.5, 1.5], TOKENS)


def test_the_call_that_it_prints_is_answered(server):
    """The printed call shows each ARM by name, with its default weight."""
    (body,) = re.findall(r"-d '(\{.*?\})'", server.log.read_text(), re.DOTALL)
    asked = json.loads(body)
    assert asked["vllm_xargs"] == {"arm_weights.kind": 0.5, "arm_weights.terse": -0.3}
    assert f"curl {server.url}/v1/chat/completions" in server.log.read_text()
    asked |= {"max_tokens": TOKENS}
    assert requests.post(f"{server.url}/v1/chat/completions", json=asked, timeout=120).status_code == 200


def test_chat_and_its_stream(server, members):
    messages = [{"role": "user", "content": TEXTS[0]}]
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    weights = {"arm_weights": [1.0, -1.0]}
    expected = TOKENIZER.decode(naive(members, ids, [1.0, -1.0], TOKENS), skip_special_tokens=True)
    expected = expected.rstrip("\N{REPLACEMENT CHARACTER}")  # a server holds back bytes that form no character yet
    assert expected
    answer = server.post("chat/completions", messages=messages, vllm_xargs=weights)
    assert answer.json()["choices"][0]["message"]["content"] == expected
    lines = server.post("chat/completions", messages=messages, vllm_xargs=weights, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == expected
    assert len(chunks) > 2


def test_chats_get_what_an_arm_was_trained_with(server):
    """The server adds the value, or the request says the same; another value is refused."""
    asked = {"messages": [{"role": "user", "content": TEXTS[0]}]}
    plain, same, other = (
        server.post("chat/completions", **asked, **more)
        for more in ({}, *({"chat_template_kwargs": {"thinking": value}} for value in (False, True)))
    )
    assert plain.json()["choices"][0]["message"] == same.json()["choices"][0]["message"]
    assert other.status_code == 400
    assert "thinking: expected False, with which the ARMs were trained" in other.json()["error"]["message"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"arm_weights": [1.0]}, "expected 2 numbers, one per ARM"),
        ({"arm_weights": "x"}, "expected a number"),
        ({"arm_weights.nobody": 1.0}, "expected 'kind', 'terse'"),
        ({"arm_weights.kind": 4.0}, "kind=4: expected -3..3"),
    ],
)
def test_wrong_weights_are_a_400_that_says_what_was_expected(server, weights, message):
    for path, body in (
        ("completions", {"prompt": "the"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "the"}]}),
    ):
        answer = server.post(path, vllm_xargs=weights, **body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    assert len(server.tokens("the")) == TOKENS


def test_rewards(server, members):
    """The answer has the ARM's own log-probability of each token of a text, in vLLM's fields."""
    asked = {"prompt": PROMPTS[0], "max_tokens": 1, "prompt_logprobs": 0, "vllm_xargs": {"arm_reward": "kind"}}
    answer = server.post("completions", **asked)
    assert answer.status_code == 200, answer.text
    rows = answer.json()["choices"][0]["prompt_logprobs"][1:]
    found = [row[str(token)]["logprob"] for row, token in zip(rows, PROMPTS[0][1:])]
    with torch.no_grad():
        logits = [member(torch.tensor([PROMPTS[0]])).logits[0, :-1, :300] for member in members]
    base, kind, _ = (each.log_softmax(-1).gather(1, torch.tensor(PROMPTS[0][1:])[:, None])[:, 0] for each in logits)
    assert found == pytest.approx(kind.tolist(), abs=1e-4)
    assert found != pytest.approx(base.tolist(), abs=1e-1)


def test_metrics(server):
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert "vllm:generation_tokens_total" in text


def test_a_client_that_hangs_up_and_many_at_once(server, members):
    body = {"model": "guided", "prompt": "the", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=60) as answer:
        next(answer.iter_content(8))
    weights = [[round(0.02 * i - 2, 2), 0.5] for i in range(200)]

    def ask(each: list[float]) -> list[int]:
        return server.tokens(PROMPTS[0], max_tokens=2, vllm_xargs={"arm_weights": each})

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, weights))
    for each, tokens in list(zip(weights, found))[::20]:
        assert tokens == naive(members, PROMPTS[0], each, 2)
    assert len({tuple(tokens) for tokens in found}) > 1


def test_the_server_says_that_its_engine_died(server):
    """This test is the last in the file, since the server answers nothing after it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    os.kill(core.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while time.monotonic() < until and server.process.poll() is None and server.health() == 200:
        time.sleep(0.5)
    assert server.process.poll() is not None or server.health() in (503, None)
    log = server.log.read_text()
    assert "EngineDeadError" in log or "died" in log or "dead" in log
