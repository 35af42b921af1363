"""The service of examples/serve.py under a real HTTP client: 32 concurrent callers, some of which hang up."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from genarm_fast import GenARM
from genarm_fast.engine.step import Steps

BODY = {"prompt": "the cat", "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture
def model(tiny_model, tokenizer):
    return GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=16)


@pytest.fixture
def url(model, monkeypatch):
    """The URL of a server in a thread of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    app = importlib.import_module("serve").make_app(model)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/generate"
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


async def text_of(client, url, seed, leave_after=None):
    """Return the text of a stream, or None for a stream that is left early."""
    pieces = []
    async with client.stream("POST", url, json={**BODY, "seed": seed, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                pieces.append(json.loads(line.removeprefix("data: ")))
            if leave_after is not None and len(pieces) >= leave_after:
                return None
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    return "".join(piece["text"] for piece in pieces)


async def impatient(client, url, seed):
    """Hang up before the whole answer comes."""
    with pytest.raises(httpx.ReadTimeout):
        await client.post(url, json={**BODY, "seed": seed, "max_new_tokens": 200}, timeout=httpx.Timeout(30, read=0.2))


def test_32_callers_of_whom_some_hang_up(model, url, monkeypatch):
    batches, launch = [], Steps.launch

    def slowly(self, batch, *rest):
        batches.append(len(batch))
        time.sleep(0.005)
        return launch(self, batch, *rest)

    async def callers():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(
                *(text_of(client, url, seed) for seed in range(16)),
                *(text_of(client, url, seed, leave_after=seed % 5 + 1) for seed in range(16, 28)),
                *(impatient(client, url, seed) for seed in range(28, 32)),
            )

    expected = [model.generate("the cat", max_new_tokens=24, ignore_eos=True, seed=seed)[0].text for seed in range(16)]
    monkeypatch.setattr(Steps, "launch", slowly)
    assert asyncio.run(callers()) == [*expected, *[None] * 16]
    end = time.perf_counter() + 20
    while model.engine().scheduler and time.perf_counter() < end:
        time.sleep(0.01)
    assert not model.engine().scheduler  # includes the long answers whose callers hung up
    assert max(batches) > 8
    assert len(batches) < 200


def test_whole_answers_and_errors(model, url):
    (expected,) = model.generate("the cat", max_new_tokens=24, ignore_eos=True, seed=3)
    answer = httpx.post(url, json={**BODY, "seed": 3}, timeout=60)
    assert answer.json()["completions"][0]["token_ids"] == expected.token_ids
    for wrong in ({"prompt": ""}, {"temprature": 1}, {"temperature": -1, "stream": True}, {"weights": [1.0, 2.0]}):
        answer = httpx.post(url, json=BODY | wrong, timeout=60)
        assert answer.status_code == 400
        assert list(answer.json()) == ["error"]
    assert httpx.post(url, content=b"{", timeout=60).status_code == 400
    assert httpx.post(url, content=b"[" * 100_000, timeout=60).status_code == 400
    assert httpx.post(url, json={"max_new_tokens": 3}, timeout=60).json() == {"error": "KeyError: 'prompt'"}


def test_several_prompts_have_several_answers(model, url):
    body = {**BODY, "prompt": ["the cat", "a man"], "seed": 1}
    expected = [output.text for output in model.generate(body["prompt"], max_new_tokens=24, ignore_eos=True, seed=1)]
    whole = httpx.post(url, json=body, timeout=60).json()
    assert [answer["completions"][0]["text"] for answer in whole] == expected
    lines = httpx.post(url, json={**body, "stream": True}, timeout=60).text.split("\n\n")
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert ["".join(piece["text"] for piece in pieces if piece["index"] == index) for index in (0, 1)] == expected


def test_answers_are_strict_json(url):
    """Banned tokens have a log-probability of -inf, which JSON cannot hold."""
    body = {"prompt": "the cat", "max_new_tokens": 2, "allowed_token_ids": [5], "logprobs": 3}
    answer = httpx.post(url, json=body, timeout=60).text
    assert json.loads(answer, parse_constant=pytest.fail)["completions"][0]["logprobs"][0]["top"]["0"] is None


@pytest.mark.parametrize("shown", [False, True])
def test_a_request_that_fails_on_its_way(model, url, monkeypatch, shown):
    """The status has been sent by then; the body says what happened."""

    def fails(sequence, *drawn):
        sequence.error = FloatingPointError("no such number")

    monkeypatch.setattr("genarm_fast.engine.sequence.Sequence.append", fails)
    text = httpx.post(url, json={**BODY, "stream": shown}, timeout=60).text
    assert json.loads(text.removeprefix("data: ")) == {"error": "prompts[0]: no such number"}
