"""The decode loop against the naive reference, token for token in float32."""

from __future__ import annotations

import random

import pytest
import torch
from against_reference import assert_equals_reference, random_batch, random_prompts
from tiny_models import FAMILIES, build_model

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.engine import scheduler
from genarm_fast.engine.model_runner import ModelRunner


@pytest.mark.parametrize("case", range(24))
def test_equals_the_reference(tiny_model, tokenizer, case):
    """Batches hold prompts of different lengths with different parameters, for 0 to 3 ARMs."""
    rng = random.Random(case)
    model, prompts, params, requests = random_batch(rng, tiny_model, tokenizer, case % 4, 4)
    outputs = model.generate(prompts, requests)
    for prompt, output, each in zip(prompts, outputs, params):
        assert output.prompt_token_ids == prompt
        assert_equals_reference(model, output, **each)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tiny_model, tokenizer, family):
    """Prompts differ in length, some are longer than the sliding windows of 8 tokens, and rows end early."""
    rng = random.Random(family)
    model = GenARM.from_pretrained(tiny_model(family), tiny_model(family, seed=1), tokenizer=tokenizer)
    params = {"max_new_tokens": 14, "stop_token_ids": list(range(2, 300, 9)), "weights": [0.8]}
    outputs = model.generate(random_prompts(rng, 5, 25), [SamplingParams(seed=i, **params) for i in range(5)])
    assert len({len(output.token_ids) for output in outputs}) > 1
    for output in outputs:
        assert_equals_reference(model, output, **params)


def test_longrope_ends_with_its_original_context(tiny_model, tokenizer):
    """Beyond the original context a row would rotate its neighbours' positions differently, and its own cached keys
    would no longer fit."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 32}
    model = GenARM.from_pretrained(tiny_model(rope_parameters=rope), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"30 prompt tokens \+ 3 new tokens: expected at most 32, the context of base"):
        model.generate([[5, 6], [7] * 30], max_new_tokens=3)
    for output in model.generate([[5, 6], [7] * 20], max_new_tokens=12, seed=1):
        assert_equals_reference(model, output, max_new_tokens=12, weights=[])


def test_a_request_does_not_see_its_neighbours(tiny_model, tokenizer):
    """A request gets the same tokens alone, in any batch, and at any place in it."""
    rng = random.Random(0)
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=3)
    prompts = random_prompts(rng, 7, 30)
    params = [SamplingParams(seed=i, max_new_tokens=5 + i) for i in range(7)]
    together = [output.token_ids for output in model.generate(prompts, params)]
    alone = [model.generate(prompt, each)[0].token_ids for prompt, each in zip(prompts, params)]
    backwards = [output.token_ids for output in model.generate(prompts[::-1], params[::-1])][::-1]
    assert together == alone == backwards


def test_seeds(tiny_model, tokenizer):
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    first, again = (model.generate([5, 6], params, seed=2**64 - 1)[0] for _ in range(2))
    assert first.token_ids == again.token_ids
    assert first.seed == 2**64 - 1
    free, other = (model.generate([5, 6], params)[0] for _ in range(2))
    assert free.token_ids != other.token_ids
    assert model.generate([5, 6], params, seed=free.seed)[0].token_ids == free.token_ids


def test_completions_of_one_prompt(tiny_model, tokenizer):
    """The n completions differ, each is what its seed gives alone, and they need more than one batch."""
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=3)
    output = model.generate([9, 8, 7], max_new_tokens=8, n=5, seed=11)[0]
    assert len({tuple(completion.token_ids) for completion in output.completions}) == 5
    assert output.completions[0].seed == 11
    for completion in output.completions:
        assert model.generate([9, 8, 7], max_new_tokens=8, seed=completion.seed)[0].token_ids == completion.token_ids


@pytest.fixture
def prefilled(monkeypatch):
    """The number of tokens of every prefill, padding included: rows times width."""
    seen = []
    prefill = ModelRunner.prefill
    monkeypatch.setattr(
        ModelRunner, "prefill", lambda self, tokens, *rest: seen.append(tokens.numel()) or prefill(self, tokens, *rest)
    )
    return seen


def test_common_beginnings_are_prefilled_once(tiny_model, tokenizer, prefilled):
    """Both prompts decoded together and later prompts in used slots share a common beginning."""
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=2)
    system = list(range(10, 40))
    prompts = [[*system, 5, 6, 7], [*system, 8], [*system, 9, 9, 9, 9, 9], [*system, 5, 6, 7], [7, 8, 9]]
    params = [SamplingParams(seed=i, weights=i - 0.5, max_new_tokens=4 + i) for i in range(5)]
    alone = [model.generate(prompt, each)[0].token_ids for prompt, each in zip(prompts, params)]
    prefilled.clear()
    assert [output.token_ids for output in model.generate(prompts, params)] == alone
    assert sum(prefilled) == 2 * (32 + 0 + 4 + 2 + 2)  # members × tokens after the beginning that a slot holds


def test_chunked_prefill(tiny_model, tokenizer, monkeypatch):
    """With chunks of 8 tokens, a beginning is copied only once its donor has all of it, and others decode meanwhile."""
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, max_batch_size=3)
    system = list(range(10, 50))
    prompts = [[7, 8], [*system, 5, 6, 7], [*system, 8], [*system, 9, 9], [3]]
    params = [SamplingParams(seed=i, max_new_tokens=8, ignore_eos=True) for i in range(5)]
    alone = [model.generate(prompt, each)[0].token_ids for prompt, each in zip(prompts, params)]
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 8)
    assert [output.token_ids for output in model.generate(prompts, params)] == alone


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_weight_zero_is_hugging_face_greedy(tiny_model, tokenizer, family):
    base = tiny_model(family)
    model = GenARM.from_pretrained(base, tiny_model(family, seed=1), tokenizer=tokenizer)
    prompts = random_prompts(random.Random(1), 4)
    outputs = model.generate(prompts, weights=0, temperature=0, max_new_tokens=20)
    for prompt, output in zip(prompts, outputs):
        expected = base.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, pad_token_id=0)
        assert output.token_ids == expected[0, len(prompt) :].tolist()


def test_unweighted_arms_are_not_run_unless_their_rewards_are_asked_for(tiny_model, tokenizer, monkeypatch):
    arm = tiny_model(seed=5)
    model = GenARM.from_pretrained(tiny_model(), arm, tokenizer=tokenizer)
    plain = model.generate([5, 6], weights=0, rewards=True, seed=1, max_new_tokens=9)[0]
    monkeypatch.setattr(arm, "forward", lambda **_: pytest.fail("the ARM ran"))
    output = model.generate([5, 6], weights=0, seed=1, max_new_tokens=9)[0]
    assert output.token_ids == plain.token_ids
    assert len(plain.rewards["arm"].tokens) == len(plain.token_ids)


def test_own_templates_give_own_positions(tiny_model, tokenizer, bos_tokenizer):
    """Members may see prompts of different lengths; they share the response."""
    base, arm = tiny_model(), tiny_model(seed=1)
    model = GenARM.from_pretrained(
        base,
        ARM(arm, prompt_template="the answer to {prompt} is:"),
        tokenizer=bos_tokenizer,
        prompt_template="Q {prompt} A",
    )
    texts = ["hi", "the cat sat on the mat"]
    outputs = model.generate(texts, max_new_tokens=9, weights=1.5, seed=2)
    for text, output in zip(texts, outputs):
        prompts = [bos_tokenizer(t)["input_ids"] for t in (f"Q {text} A", f"the answer to {text} is:")]
        assert len(prompts[0]) != len(prompts[1])
        assert_equals_reference(model, output, max_new_tokens=9, weights=[1.5], prompts=prompts)


@pytest.mark.parametrize("widths", [(300, 304), (320, 300), (304, 320)])
def test_vocabulary_padding(tiny_model, tokenizer, widths):
    """With members of different widths, only the 300 tokens that all members and the tokenizer share are ever drawn."""
    base, arm = (tiny_model(seed=i, vocab_size=width) for i, width in enumerate(widths))
    model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
    assert model.vocab_size == 300
    output = model.generate([7, 8], max_new_tokens=30, temperature=3.0, seed=4, rewards=True, logprobs=2)[0]
    assert_equals_reference(model, output, max_new_tokens=30, temperature=3.0, weights=[1.0])


def test_list_of_end_tokens(tiny_model, tokenizer):
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    free = model.generate([5, 6], seed=1, ignore_eos=True, max_new_tokens=10)[0].token_ids
    ended = tiny_model(eos_token_id=[1, free[4]])
    model = GenARM.from_pretrained(ended, tokenizer=tokenizer)
    output = model.generate([5, 6], seed=1, max_new_tokens=10)[0]
    stop = free.index(free[4])
    assert output.token_ids == free[: stop + 1]
    assert (output.finish_reason, output.completions[0].stop_reason) == ("stop", free[4])
    assert output.text == tokenizer.decode(free[:stop])


def test_processors_see_prompt_and_output(tiny_model, tokenizer):
    """Hugging Face processors and callables act on normalised log-probabilities of the combination."""
    from transformers import NoRepeatNGramLogitsProcessor

    seen = []

    def spy(input_ids, scores):
        seen.append((input_ids[0].tolist(), float(scores.logsumexp(-1))))
        return scores

    processors = [NoRepeatNGramLogitsProcessor(1), spy]
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    output = model.generate([5, 6], logits_processors=processors, temperature=0, max_new_tokens=20, ignore_eos=True)[0]
    assert len({5, 6, *output.token_ids}) == 22
    assert [ids for ids, _ in seen] == [[5, 6, *output.token_ids[:i]] for i in range(20)]
    assert seen[0][1] < 0  # two tokens are banned
    params = {"logits_processors": processors, "temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    assert_equals_reference(model, output, weights=[1.0], **params)


def test_user_model_is_left_as_it_was(tokenizer):
    model = build_model("llama", 0, attention_dropout=0.5).train()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    guided = GenARM.from_pretrained(model, model, tokenizer=tokenizer)
    first, second = (guided.generate([5, 6], seed=1, max_new_tokens=9)[0].token_ids for _ in range(2))
    assert first == second  # dropout is off
    assert model.training
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert guided.base.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_penalties_count_what_was_generated(model):
    """A large frequency penalty prevents repetition; a presence penalty does not grow with the count."""
    run = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.0}
    plain, unique = (model.generate([5, 6], **run, frequency_penalty=penalty)[0].token_ids for penalty in (0.0, 50.0))
    assert len(set(plain)) < len(plain)
    assert len(set(unique)) == len(unique)
    again = model.generate([5, 6], **run, presence_penalty=50.0, allowed_token_ids=[7, 8])[0].token_ids
    assert set(again[:2]) == {7, 8}
    assert sorted(set(again)) == [7, 8]


def test_weights_by_name(model):
    """ARMs that are not named keep their own weight."""
    named = model.generate([5, 6, 7], seed=1, weights={"b": 0.3})[0].completions[0]
    assert set(named.weights) == {(0.5, 0.3)}
    assert named.token_ids == model.generate([5, 6, 7], seed=1, weights=[0.5, 0.3])[0].token_ids
    with model.stream([5, 6, 7], seed=1, max_new_tokens=3, ignore_eos=True) as stream:
        next(stream)
        stream.set_weights({"a": 2.0})
        list(stream)
    assert stream.output.completions[0].weights == [(0.5, -1.0), (2.0, -1.0), (2.0, -1.0)]
    with pytest.raises(ValueError, match=r"^prompts\[0\]: weights: 'c': expected 'a', 'b'$"):
        model.generate([5], weights={"c": 1.0})


def test_what_a_text_shows_of_its_end(model, tokenizer):
    """The text leaves out the stop string, the stop token and special tokens unless the request asks for them."""
    run = {"seed": 1, "max_new_tokens": 20, "ignore_eos": True, "allowed_token_ids": [*range(60, 80), 1]}
    run["logit_bias"] = {1: 6.0}
    special = model.generate([5], **run)[0]
    assert tokenizer.eos_token_id in special.token_ids
    assert "</s>" not in special.text
    shown = model.generate([5], **run, skip_special_tokens=False)[0]
    assert shown.token_ids == special.token_ids
    assert shown.text == tokenizer.decode(special.token_ids, clean_up_tokenization_spaces=False)
    stop = special.text[4:6]
    for include in (False, True):
        text = model.generate([5], **run, stop=stop, include_stop_str_in_output=include)[0].text
        assert text == special.text[: special.text.index(stop) + include * len(stop)]
    token = special.token_ids[3]
    ended = model.generate([5], **run, stop_token_ids=[token], include_stop_str_in_output=True)[0]
    assert ended.text == tokenizer.decode(ended.token_ids, skip_special_tokens=True)
    assert ended.token_ids[-1] == token


def test_max_time_ends_a_text_where_it_is(model, monkeypatch):
    """The limit ends a running, a waiting and a half-prefilled request. The tokens so far begin the whole text."""
    clock = iter(range(10**6))
    whole = model.generate([5, 6], seed=1, max_new_tokens=100, ignore_eos=True)[0].token_ids
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    params = {"seed": 1, "max_new_tokens": 100, "ignore_eos": True}
    output, waiting = model.generate(
        [[5, 6], [7, 8]], [SamplingParams(**params, max_time=60.0), SamplingParams(**params, max_time=0.5)]
    )
    assert output.finish_reason == waiting.finish_reason == "time"
    assert 0 < len(output.token_ids) < 100
    assert output.token_ids == whole[: len(output.token_ids)]
    assert waiting.token_ids == []
    assert not model.engine().scheduler
    assert not model.engine().scheduler.with_deadline


def test_priority_comes_first_and_nobody_starves(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_OVERTAKEN", 2)
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer, max_batch_size=1)
    priorities = [0, 0, 5, 1, 5, 7, 5]
    params = [SamplingParams(max_new_tokens=2, ignore_eos=True, priority=p) for p in priorities]
    engine, left = model.engine(), []
    sequences = [engine.add(request)[0] for request in model.prepare([[5]] * len(params), params)]
    assert [sequences.index(each) for each in engine.scheduler.waiting] == [2, 3, 0, 1, 5, 4, 6]
    while engine.scheduler:
        left += [sequences.index(each) for each in engine.step() if each.ended]
    assert left == [2, 3, 0, 1, 5, 4, 6]
