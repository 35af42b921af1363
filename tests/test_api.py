"""The public API: prompts, text, stop strings, streams, scores, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import build_model

import genarm_fast
from genarm_fast import ARM, GenARM, GenerationError, SamplingParams, reference
from genarm_fast.requests import sample_seed
from genarm_fast.score import CHUNK_ELEMENTS

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tiny_model, tokenizer):
    arms = [ARM(tiny_model(seed=1), name="a", weight=0.5), ARM(tiny_model(seed=2), name="b", weight=-1.0)]
    return GenARM.from_pretrained(tiny_model(), arms, tokenizer=tokenizer)


class Spell:
    """A processor that makes the model say given tokens."""

    def __init__(self, token_ids, prompt_tokens):
        self.token_ids = token_ids
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids, scores):
        token = self.token_ids[input_ids.shape[1] - self.prompt_tokens]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def spelled(tokenizer, text):
    """Prompt and parameters with which any model says `text`, then </s>."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return [5, 6], SamplingParams(logits_processors=[Spell(ids, 2)], max_new_tokens=len(ids))


def test_import_is_light():
    code = "import sys, genarm_fast; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        genarm_fast.nothing  # noqa: B018


def test_one_call(tiny_model, tmp_path, tokenizer, model):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arms = [ARM(tiny_model(seed=1), weight=0.5), ARM(tiny_model(seed=2), weight=-1.0)]
    (output,) = genarm_fast.generate(tmp_path, arms, "hi", seed=1, max_new_tokens=6)
    assert output.token_ids == model.generate("hi", seed=1, max_new_tokens=6)[0].token_ids


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("hi", 1),
        (["hi", "ho"], 2),
        (CHAT, 1),
        ([CHAT, CHAT], 2),
        ([5, 6], 1),
        ([[5], [6, 7]], 2),
        (["hi", CHAT, [5]], 3),
    ],
)
def test_prompt_forms(model, prompts, count):
    outputs = model.generate(prompts, max_new_tokens=2)
    assert len(outputs) == count
    alone = prompts if count > 1 else [prompts]
    assert [output.prompt for output in outputs] == alone


def test_chat_templates(tiny_model, tokenizer, bos_tokenizer):
    """Each member's own; no second <s> where the template has one."""
    arm = ARM(tiny_model(seed=1), chat_template="{% for m in messages %}{{ m.content }}{% endfor %}?")
    model = GenARM.from_pretrained(tiny_model(), arm, tokenizer=bos_tokenizer)
    (request,) = model.prepare(CHAT)
    assert tokenizer.decode(request.token_ids[0]) == "<s>[user] hi</s>[assistant] "
    assert tokenizer.decode(request.token_ids[1]) == "hi?"
    assert model.prepare("<s>hi")[0].token_ids == model.prepare("hi")[0].token_ids


def test_output(model):
    output = model.generate(CHAT, n=2, seed=7, max_new_tokens=5, logprobs=3, rewards=True, ignore_eos=True)[0]
    first, second = output.completions
    assert [first.seed, second.seed] == [7, sample_seed(7, 1)]
    assert output.usage.prompt_tokens == len(output.prompt_token_ids)
    assert output.usage.completion_tokens == 10
    assert output.timing.prefill > 0
    assert output.timing.tokens_per_second == pytest.approx(10 / output.timing.decode)
    assert first.weights == [(0.5, -1.0)] * 5
    assert output.finish_reason == "length"
    for token, logprob in zip(first.token_ids, first.logprobs):
        values = list(logprob.top.values())
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert logprob.top.get(token, logprob.logprob) == logprob.logprob <= values[0]
    assert list(output.rewards) == ["a", "b"]
    data = json.loads(json.dumps(output.to_dict()))
    assert data["completions"][0]["rewards"]["a"]["total"] == pytest.approx(sum(first.rewards["a"].tokens))


def test_rewards_equal_scores(model):
    """What generation reports is what teacher forcing gives, EOS included."""
    outputs = model.generate(
        [CHAT, "the cat", [9, 10]], seed=3, max_new_tokens=12, rewards=True, stop_token_ids=range(2, 60)
    )
    scores = model.score([o.prompt for o in outputs], [o.token_ids for o in outputs])
    assert len({len(output.token_ids) for output in outputs}) > 1
    for output, score in zip(outputs, scores):
        assert score.token_ids == output.token_ids
        for name in ("a", "b"):
            assert score.rewards[name].tokens == pytest.approx(output.rewards[name].tokens, abs=1e-4)


@pytest.mark.parametrize("limit", [1, 3000, 1 << 24])
def test_scores(model, monkeypatch, limit):
    """Against plain forwards, for any size of the pieces in which long responses are scored."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", limit)
    prompts, responses = ["the cat", "a", [5]], ["sat on the mat", "é" * 20, [7, 8]]
    for score, prompt, response in zip(model.score(prompts, responses), prompts, responses):
        ids = prompt if isinstance(prompt, list) else model.tokenizer(prompt)["input_ids"]
        answer = response if isinstance(response, list) else [*model.tokenizer(response)["input_ids"], 1]
        assert score.token_ids == answer
        for member, found in zip(model.members, [score.base_logprobs, *(r.tokens for r in score.rewards.values())]):
            table = member.model(torch.tensor([ids + answer])).logits[0].log_softmax(-1).detach()
            expected = [float(table[len(ids) + i - 1, token]) for i, token in enumerate(answer)]
            assert found == pytest.approx(expected, abs=1e-4)


def test_scores_over_the_common_vocabulary(tiny_model, tokenizer):
    """Probability on ids that not all members have does not count."""
    wide = tiny_model(seed=1, vocab_size=400)
    (score,) = GenARM.from_pretrained(tiny_model(), wide, tokenizer=tokenizer).score([[5, 6]], [[7]])
    expected = wide(torch.tensor([[5, 6]])).logits[0, -1, :300].log_softmax(-1)[7]
    assert score.rewards["arm"].total == pytest.approx(float(expected.detach()), abs=1e-5)


def test_score_forms(model):
    assert model.score("a", "b", append_eos=False)[0].token_ids == model.tokenizer("b")["input_ids"]
    assert model.score(CHAT, "b")[0].token_ids == [*model.tokenizer("b")["input_ids"], 1]
    assert model.score([5], [[6, 7]])[0].token_ids == [6, 7]
    assert model.score([5], [6, 7])[0].token_ids == [6, 7]
    assert json.dumps(model.score("a", "b")[0].to_dict())


@pytest.mark.parametrize("stop", ["mat.", " on", "n the m", "\n\nUser", "é"])
def test_stop_strings_across_tokens(model, tokenizer, stop):
    """Cut there, with the tokens up to the one that completed the stop string; the same text in a stream."""
    text = "the cat sat on the mat. café\n\nUser: hi"
    prompt, params = spelled(tokenizer, text)
    output = model.generate(prompt, params, stop=["never", stop])[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.completions[0].stop_reason) == ("stop", stop)
    assert stop in tokenizer.decode(output.token_ids)
    assert stop not in tokenizer.decode(output.token_ids[:-1])
    with model.stream(prompt, params, stop=["never", stop]) as stream:
        pieces = [chunk.text for chunk in stream]
    assert "".join(pieces) == stream.output.text == output.text
    held = [piece for i, piece in enumerate(pieces) if not output.text.startswith("".join(pieces[: i + 1]))]
    assert held == []


def test_stream_of_many_byte_characters(model, tokenizer):
    text = "日本語 👩‍👩‍👧 café"
    prompt, params = spelled(tokenizer, text)
    with model.stream(prompt, params) as stream:
        pieces = [chunk.text for chunk in stream]
    assert "".join(pieces) == text == stream.output.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.output.finish_reason == "stop"
    assert stream.output.completions[0].stop_reason == 1
    cut = model.generate(prompt, params, max_new_tokens=len(tokenizer("日本")["input_ids"]) - 1)[0]
    assert cut.text == tokenizer.decode(cut.token_ids) == "日\ufffd"


def test_stream_equals_generate(model):
    params = SamplingParams(seed=5, max_new_tokens=20, rewards=True, logprobs=1)
    stream = model.stream("the cat", params, speculation="off")
    with pytest.raises(RuntimeError, match="at its end"):
        _ = stream.output
    chunks = list(stream)
    expected = model.generate("the cat", params, speculation="off")[0]
    assert stream.output.completions == expected.completions
    assert [token for chunk in chunks for token in chunk.token_ids] == expected.token_ids
    assert [w for chunk in chunks for w in chunk.weights] == expected.completions[0].weights


def test_weights_change_at_the_next_token(model):
    """Equals the naive decoder with these weights per token, and is recorded."""
    schedule = {0: (0.5, -1.0), 3: (0.0, 2.0), 7: (0.0, 0.0), 9: (1.5, 1.5)}
    stream = model.stream([5, 6, 7], seed=9, max_new_tokens=14, ignore_eos=True, rewards=True, speculation="off")
    for i, _ in enumerate(stream):
        if i + 1 in schedule:
            stream.set_weights(schedule[i + 1] if i + 1 != 9 else 1.5)
    used = [schedule[max(start for start in schedule if start <= i)] for i in range(14)]
    assert stream.output.completions[0].weights == used
    expected = reference.generate(
        model.base.model,
        [arm.model for arm in model.arms],
        [[5, 6, 7]] * 3,
        lambda i: used[i],
        max_new_tokens=14,
        seed=9,
    )
    assert stream.output.token_ids == expected.tokens
    with pytest.raises(ValueError, match="expected 2 numbers"):
        stream.set_weights([1.0])


def test_stream_of_several_prompts(model):
    """More of them than slots; each as generate gives it, with weights of its own."""
    prompts = ["the cat", [5, 6], "that", "a man and the sea", [9]]
    params = [SamplingParams(seed=i, max_new_tokens=6 + i) for i in range(5)]
    model.max_batch_size, before = 2, model.max_batch_size
    with model.stream(prompts, params, weights=[0.5, -1.0]) as stream:
        stream.set_weights([1.0, 0.0], index=3)
        chunks = list(stream)
    model.max_batch_size = before
    weights = [[1.0, 0.0] if i == 3 else [0.5, -1.0] for i in range(5)]
    expected = model.generate(prompts, [p.override(weights=w) for p, w in zip(params, weights)])
    assert [output.completions for output in stream.outputs] == [output.completions for output in expected]
    for i, output in enumerate(expected):
        own = [chunk for chunk in chunks if chunk.index == i]
        assert "".join(chunk.text for chunk in own) == output.text
        assert [token for chunk in own for token in chunk.token_ids] == output.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [output.finish_reason]


def test_an_arm_may_be_switched_on_in_mid_stream(model):
    """Its cache is kept up to date while its weight is 0."""
    stream = model.stream([5, 6], weights=0, seed=2, max_new_tokens=10, ignore_eos=True, speculation="off")
    for i, _ in enumerate(stream):
        if i == 3:
            stream.set_weights([2.0, 0.0])
    arms = [arm.model for arm in model.arms]
    expected = reference.generate(
        model.base.model, arms, [[5, 6]] * 3, lambda i: [0, 0] if i < 4 else [2, 0], max_new_tokens=10, seed=2
    )
    assert stream.output.token_ids == expected.tokens


def test_cancel_a_stream(model):
    """In mid-generation; the model is as good as new."""
    params = SamplingParams(seed=5, max_new_tokens=20, ignore_eos=True)
    expected = model.generate("the cat", params)[0].token_ids
    with model.stream("the cat", params, speculation="off") as stream:
        for _ in range(4):
            next(stream)
    assert stream.output.finish_reason == "cancelled"
    assert stream.output.token_ids == expected[:4]
    assert list(stream) == []
    untouched = model.stream("the cat", params)
    untouched.close()
    assert untouched.output.token_ids == []
    assert torch.is_inference_mode_enabled() is False
    assert model.generate("the cat", params)[0].token_ids == expected


def test_streams_do_not_disturb_each_other(model):
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    streams = [model.stream([5 + i], params, seed=i, speculation="off") for i in range(3)]
    for _ in zip(*streams):
        assert not torch.is_inference_mode_enabled()
    for i, stream in enumerate(streams):
        assert stream.output.token_ids == model.generate([5 + i], params, seed=i)[0].token_ids


def test_minimum_length(model):
    """Neither EOS nor stop ids before it, even when they are all that is wanted."""
    params = SamplingParams(logit_bias={1: 1000.0, 9: 1000.0}, stop_token_ids=[9], max_new_tokens=20)
    assert len(model.generate([5], params)[0].token_ids) == 1
    output = model.generate([5], params, min_new_tokens=7)[0]
    assert len(output.token_ids) == 8
    assert not {1, 9} & set(output.token_ids[:7])


REFUSALS = [
    ("", {}, ValueError, r"prompts\[0\]='': expected a non-empty prompt"),
    ([], {}, ValueError, r"prompts=\[\]: expected at least one"),
    (["a", []], {}, ValueError, r"prompts\[1\]=\[\]: expected at least one token id or chat message"),
    (3, {}, TypeError, "prompts=3: expected a string"),
    (["a", 3.5], {}, TypeError, r"prompts\[1\]=3.5: expected"),
    ([{"role": "user"}], {}, ValueError, r"prompts\[0\]: message .*expected the keys 'role' and 'content'"),
    ([5, 300], {}, ValueError, r"prompts\[0\]: token ids 5..300: expected 0..299"),
    ([5, -1], {}, ValueError, r"prompts\[0\]: token ids -1..5: expected 0..299"),
    (
        ["a", [5] * 100],
        {"max_new_tokens": 157},
        ValueError,
        r"prompts\[1\]: 100 prompt tokens \+ 157 new tokens: .* 256",
    ),
    ("a", {"weights": [1.0]}, ValueError, r"weights=\(1.0,\): expected 2 numbers, one per ARM, got 1"),
    ("a", {"weights": [1.0, float("inf")]}, ValueError, "expected finite numbers, got inf"),
    ("a", {"stop_token_ids": [300]}, ValueError, "stop_token_ids: token id 300: expected less than 300"),
    ("a", {"logit_bias": {300: 1.0}}, ValueError, "logit_bias: token id 300: expected less than 300"),
    ("a", {"logprobs": 301}, ValueError, "logprobs=301: expected at most 300"),
    ("a", {"temperature": -1}, ValueError, "temperature=-1: expected a finite number >= 0"),
    ("a", {"top_p": 0}, ValueError, r"top_p=0: expected a number in \(0, 1\]"),
    ("a", {"typo": 1}, TypeError, "unknown sampling parameter 'typo'"),
    (
        "a",
        {"sampling_params": [SamplingParams()] * 2},
        ValueError,
        "sampling_params: expected one, or 1, one per prompt, got 2",
    ),
]


@pytest.mark.parametrize(("prompts", "arguments", "error", "message"), REFUSALS)
def test_refused_before_any_work(model, monkeypatch, prompts, arguments, error, message):
    for member in model.members:
        monkeypatch.setattr(member.model, "forward", lambda **_: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        model.generate(prompts, **arguments)


def test_narrowest_context_counts(tiny_model, tokenizer):
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1, max_position_embeddings=16), tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"prompts\[0\]: 10 prompt tokens \+ 7 new tokens: expected at most 16, .* arm"
    ):
        model.generate([5] * 10, max_new_tokens=7)
    assert len(model.generate([5] * 10, max_new_tokens=6, ignore_eos=True)[0].token_ids) == 6
    with pytest.raises(ValueError, match="the context of arm"):
        model.score([5] * 10, [6] * 7)


def test_chat_without_a_template(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\]: base has no chat template: pass chat_template"):
        model.generate(CHAT)


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        (["a", "b"], ["c"], "responses: expected 2, one per prompt, got 1"),
        (["a"], [[]], r"responses\[0\]=\[\]: expected at least one token"),
        (["a"], [[300]], r"responses\[0\]: token ids 300..300: expected 0..299"),
    ],
)
def test_score_refusals(model, prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        model.score(prompts, responses)


def test_stream_refusals(model):
    with pytest.raises(ValueError, match="n=2: expected 1 in a stream"):
        model.stream("a", n=2)
    with pytest.raises(IndexError):
        model.stream("a").set_weights(1.0, index=1)


def test_nan_fails_alone(tokenizer, tiny_model):
    """The message names prompt and member; the other request of the same batch is not lost."""
    broken = build_model("llama", 1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[42] = torch.nan
    model = GenARM.from_pretrained(tiny_model(), ARM(broken, name="helpful"), tokenizer=tokenizer)
    params = SamplingParams(seed=1, max_new_tokens=5, logit_bias={42: -torch.inf})
    with pytest.raises(GenerationError, match=r"prompts\[1\]: NaN or \+inf logits from helpful at token 0") as caught:
        model.generate([[5], [42], [6]], params)
    good = [caught.value.outputs[i].token_ids for i in (0, 2)]
    assert good == [output.token_ids for output in model.generate([[5], [6]], params)]
    assert caught.value.outputs[1] is None
    chunks, stream = [], model.stream([[42], [5]], params)
    with pytest.raises(GenerationError, match=r"prompts\[0\]: .* from helpful") as caught:
        chunks.extend(stream)
    assert caught.value.outputs[1].token_ids == good[0]


def test_everything_banned(model):
    with pytest.raises(GenerationError, match=r"prompts\[0\]: every token is masked at token 0"):
        model.generate("a", logit_bias=dict.fromkeys(range(300), -torch.inf))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, scores: scores[0], r"returned \(300,\), expected scores of shape \(1, 300\)"),
        (lambda ids, scores: None, "returned None, expected scores"),
        (lambda ids, scores: scores * torch.nan, r"returned NaN or \+inf"),
        (lambda ids, scores: {}["missing"], "'missing'"),
    ],
)
def test_a_bad_processor_fails_alone(model, processor, message):
    params = SamplingParams(max_new_tokens=3, seed=1, ignore_eos=True)
    with pytest.raises(GenerationError, match=message) as caught:
        model.generate([[5], [6]], [params, params.override(logits_processors=[processor])])
    assert caught.value.outputs[1] is None
    assert caught.value.outputs[0].token_ids == model.generate([5], params)[0].token_ids
