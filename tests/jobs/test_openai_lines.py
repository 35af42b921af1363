"""OpenAI's batch lines in and out, fields that lines pass on, and the text of tokens in JSON."""

from __future__ import annotations

import json

import pytest

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.jobs import ResultsFile, read_requests, run
from genarm_fast.text.detokenize import token_bytes, token_text
from genarm_fast.utils.jsonlines import dumps

CHAT = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
TEXT = {"custom_id": "b", "method": "POST", "url": "/v1/completions"}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tiny_model, tokenizer):
    return GenARM.from_pretrained(tiny_model(), ARM(tiny_model(seed=1), name="kind"), tokenizer=tokenizer)


def lines(tmp_path, *rows):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(model, tmp_path, *rows, keep=(), **defaults):
    requests = read_requests(lines(tmp_path, *rows), SamplingParams(**defaults), arms=1, keep=keep)
    path = tmp_path / "out.jsonl"
    for _ in range(2):  # the second run finds all answers there
        with ResultsFile(path, requests, "setup") as results:
            summary = run(model, requests, results)
    assert summary.answered == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def near(logprobs):
    """Allow for float32 rounding: 1e-6 for a logit near 10, and another batch adds in another order."""
    return pytest.approx(logprobs, abs=2e-5)


def test_answers_have_the_shape_of_openais(model, tokenizer, tmp_path):
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 5, "n": 2, "top_k": 50, "weights": [0.5]}
    chat = {"model": "mine", "messages": HELLO, "max_completion_tokens": 9, **sampling}
    text = {"model": "mine", "prompt": "the cat", "max_tokens": 8, "seed": 7, "logprobs": 2, "rewards": True}
    chat |= {"logprobs": True, "top_logprobs": 3, "stream": False, "tools": [], "user": "me", "stop": None}
    first, second = answers(model, tmp_path, {**CHAT, "body": chat}, {**TEXT, "body": text})
    assert (first["custom_id"], first["error"], first["response"]["status_code"]) == ("a", None, 200)
    body = first["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "mine")
    (output,) = model.generate([HELLO], SamplingParams(**sampling, max_new_tokens=9, logprobs=3))
    for index, (choice, completion) in enumerate(zip(body["choices"], output.completions)):
        assert choice["index"] == index
        assert choice["message"] == {"role": "assistant", "content": completion.text}
        assert choice["finish_reason"] == completion.finish_reason
        content = choice["logprobs"]["content"]
        assert [each["token"] for each in content] == [token_text(tokenizer, t) for t in completion.token_ids]
        assert [each["logprob"] for each in content] == near([each.logprob for each in completion.logprobs])
        assert [[each["logprob"] for each in entry["top_logprobs"]] for entry in content] == [
            near(list(each.top.values())) for each in completion.logprobs
        ]
        assert [bytes(each["bytes"]) for each in content] == [token_bytes(tokenizer, t) for t in completion.token_ids]
    total = output.usage.prompt_tokens + output.usage.completion_tokens
    assert body["usage"]["total_tokens"] == total
    body = second["response"]["body"]
    (output,) = model.generate(["the cat"], SamplingParams(seed=7, max_new_tokens=8, logprobs=2, rewards=True))
    (choice,) = body["choices"]
    assert (body["object"], choice["text"]) == ("text_completion", output.text)
    assert choice["logprobs"]["token_logprobs"] == near([each.logprob for each in output.logprobs])
    assert choice["logprobs"]["text_offset"][:2] == [0, len(choice["logprobs"]["tokens"][0])]
    assert choice["rewards"]["kind"]["total"] == near(output.rewards["kind"].total)


def test_a_line_that_fails_is_tried_again(model, tmp_path):
    requests = read_requests(lines(tmp_path, {**TEXT, "body": {"prompt": "x", "seed": 1}}), SamplingParams(), arms=1)

    class Broken:
        max_batch_size, tokenizer, prepare = 1, model.tokenizer, model.prepare

        def as_completed(self, prompts, params):
            raise RuntimeError("no")

    with ResultsFile(tmp_path / "out.jsonl", requests, "setup") as results:
        assert run(Broken(), requests, results).errors == [("b", "RuntimeError: no")]
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["response"] is None
    assert row["error"] == {"code": "generation_error", "message": "RuntimeError: no"}
    with ResultsFile(tmp_path / "out.jsonl", requests, "setup") as results:
        assert run(model, requests, results).answered == 1
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["error"] is None


WRONG = [
    ({"custom_id": 3}, "custom_id=3: expected a text"),
    ({"method": "GET"}, "method='GET': expected 'POST'"),
    ({"url": "/v1/embeddings"}, "url='/v1/embeddings': expected '/v1/chat/completions' or '/v1/completions'"),
    ({"body": None}, "body=None: expected an object"),
    ({"body": {"prompt": "x"}}, "body: expected 'messages' in it"),
    ({"id": 1}, "id: expected one of body, custom_id, method, url"),
    ({"body": {"messages": "hi"}}, "messages='hi': expected a list of messages"),
    ({"body": {"messages": HELLO, "stream": True}}, "stream=True: expected none, or False"),
    ({"body": {"messages": HELLO, "tools": [{}]}}, r"tools=\[\{\}\]: expected none, or \[\]"),
    ({"body": {"messages": HELLO, "response_format": {"type": "json"}}}, "response_format="),
    ({"body": {"messages": HELLO, "temprature": 1}}, "temprature=1: expected one of"),
    ({"body": {"messages": HELLO, "logprobs": 3}}, "logprobs=3: expected true or false"),
    ({"body": {"messages": HELLO, "top_logprobs": 3}}, "top_logprobs=3: expected logprobs=true with it"),
    ({"body": {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}}, "max_completion_tokens=4: expected"),
    ({"body": {"messages": HELLO, "temperature": -1}}, "temperature=-1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_wrong_lines_name_the_field(change, message, tmp_path):
    path = lines(tmp_path, {**CHAT, "body": {"messages": HELLO}, **change})
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        read_requests(path, SamplingParams(), arms=1)


def test_fields_are_passed_on_if_they_are_named(model, tmp_path):
    row = {"prompt": "the cat", "metadata": {"split": "dev"}, "source": [1, None], "max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"source=\[1, None\]: expected one of .*; other fields go to the output"):
        read_requests(lines(tmp_path, row), SamplingParams(), arms=1)
    (out,) = answers(model, tmp_path, row, keep=["source", "absent"])
    assert (out["metadata"], out["source"]) == ({"split": "dev"}, [1, None])
    assert "absent" not in out
    (other,) = read_requests(lines(tmp_path, row | {"source": 2}), SamplingParams(), arms=1, keep=["source"])
    with pytest.raises(ValueError, match="another prompt or other parameters"):
        ResultsFile(tmp_path / "out.jsonl", [other], "setup")
    with pytest.raises(ValueError, match="keep='usage': expected a name that means nothing"):
        read_requests(lines(tmp_path, row), SamplingParams(), arms=1, keep=["usage"])


def test_log_probabilities_have_the_text_of_their_tokens(model, tokenizer, tmp_path):
    (out,) = answers(model, tmp_path, {"prompt": "the cat", "logprobs": 2, "max_new_tokens": 6, "seed": 1})
    (completion,) = out["completions"]
    entries = completion["logprobs"]
    assert [each["token"] for each in entries] == [token_text(tokenizer, t) for t in completion["token_ids"]]
    for each in entries:
        assert each["top_tokens"] == {i: token_text(tokenizer, int(i)) for i in each["top"]}
    assert token_text(tokenizer, tokenizer(" the")["input_ids"][0])[0] == " "
    assert token_text(tokenizer, tokenizer.eos_token_id) == "</s>"
    assert json.loads(dumps({"x": token_text(tokenizer, 200)})) == {"x": token_text(tokenizer, 200)}


def test_the_text_of_a_sentencepiece_token_keeps_its_space():
    """`decode` of such a token by itself drops the space."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "▁the": 2, "▁a": 3}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([2]) == "the"
    assert token_text(tokenizer, 2) == " the"
