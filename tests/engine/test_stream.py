"""Streams: pieces of text, stop strings, weights that change on the way, an early end."""

from __future__ import annotations

import pytest
import torch

from genarm_fast import SamplingParams, reference


class Spell:
    """A processor that forces given tokens."""

    def __init__(self, token_ids, prompt_tokens):
        self.token_ids = token_ids
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids, scores):
        token = self.token_ids[input_ids.shape[1] - self.prompt_tokens]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def spelled(tokenizer, text):
    """Return a prompt and parameters with which any model generates `text`, then </s>."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return [5, 6], SamplingParams(logits_processors=[Spell(ids, 2)], max_new_tokens=len(ids))


@pytest.mark.parametrize("stop", ["mat.", " on", "n the m", "\n\nUser", "é"])
def test_stop_strings_across_tokens(model, tokenizer, stop):
    """The text is cut at the stop string, and the tokens end with the one that completed it. A stream gives the same
    text."""
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
    """The tokens equal the naive decoder's with these weights per token, and the weights are recorded."""
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


def test_weights_set_in_mid_round_wait_for_its_end(model):
    """Another thread may set weights in mid-round. The round's token is drawn and recorded with the weights at its
    begin."""
    weights = [(0.5, -1.0), (2.0, 0.0)]

    def steer(input_ids, scores):
        if input_ids.shape[1] == 3 + 4:
            stream.set_weights(weights[1])
        return scores

    stream = model.stream([5, 6, 7], seed=9, max_new_tokens=9, ignore_eos=True, logits_processors=[steer])
    assert len(list(stream)) == 9
    used = [weights[i > 4] for i in range(9)]
    assert stream.output.completions[0].weights == used
    arms = [arm.model for arm in model.arms]
    expected = reference.generate(model.base.model, arms, [[5, 6, 7]] * 3, lambda i: used[i], max_new_tokens=9, seed=9)
    assert stream.output.token_ids == expected.tokens


def test_close_in_mid_round(model):
    def close(input_ids, scores):
        if input_ids.shape[1] == 3 + 4:
            stream.close()
        return scores

    stream = model.stream([5, 6, 7], seed=9, max_new_tokens=9, ignore_eos=True, logits_processors=[close])
    assert len(list(stream)) == 5
    assert stream.output.finish_reason == "cancelled"


def test_stream_of_several_prompts(model):
    """There are more prompts than slots; each equals `generate` with its own weights."""
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
    """The ARM's cache stays up to date while its weight is 0."""
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
    """The stream is cancelled in mid-generation; later calls are unaffected."""
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


def test_stream_refusals(model):
    with pytest.raises(ValueError, match="n=2: expected 1 in a stream"):
        model.stream("a", n=2)
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"index={index}: expected 0..0"):
            model.stream("a").set_weights(1.0, index=index)


def test_one_prompt_of_a_stream_is_closed(model):
    params = SamplingParams(seed=5, max_new_tokens=12, ignore_eos=True)
    whole = [output.token_ids for output in model.generate([[5, 6], [7, 8]], params)]
    with model.stream([[5, 6], [7, 8]], params) as stream:
        next(stream), next(stream)
        stream.close(0)
        with pytest.raises(IndexError, match=r"index=2: expected 0\.\.1"):
            stream.close(2)
        assert all(chunk.index == 1 for chunk in stream)
    assert [output.finish_reason for output in stream.outputs] == ["cancelled", "length"]
    assert [output.token_ids for output in stream.outputs] == [whole[0][:1], whole[1]]
