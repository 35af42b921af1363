"""The public API: prompts, outputs, every refusal, and requests that fail alone."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from unittest.mock import Mock

import numpy
import pytest
import torch
from tiny_models import build_model

import genarm_fast
from genarm_fast import ARM, GenARM, GenerationError, SamplingParams, api
from genarm_fast.engine.sequence import sample_seed

CHAT = [{"role": "user", "content": "hi"}]


def test_import_is_light():
    code = "import sys, genarm_fast; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        genarm_fast.nothing  # noqa: B018


def test_ops_are_registered_before_transformers_is_imported(monkeypatch):
    """Registering the ops scans all loaded modules, so it has to come before transformers loads its own."""
    imported, anything = [], Mock()
    monkeypatch.setattr(genarm_fast, "import_module", lambda name, package: imported.append(name) or anything)
    monkeypatch.delitem(sys.modules, "genarm_fast.api")
    for name in ("GenARM", "generate", "SamplingParams"):
        genarm_fast.__getattr__(name)
    assert imported == [".kernels", ".api", ".api", ".kernels", ".api", ".functional", ".params"]


def test_the_collector_of_circles_waits_for_imports_and_loading(monkeypatch, tiny_model, tokenizer):
    """The first import pauses the garbage collector. Later names look only at `sys.modules` and leave it running."""
    seen, load = [], api.load_members
    monkeypatch.setattr(genarm_fast, "import_module", lambda *_: seen.append(gc.isenabled()) or Mock())
    genarm_fast.__getattr__("GenARM")
    monkeypatch.delitem(sys.modules, "genarm_fast.api")
    genarm_fast.__getattr__("GenARM")
    assert seen == [True, False, False, True]
    monkeypatch.setattr(api, "load_members", lambda *each, **more: seen.append(gc.isenabled()) or load(*each, **more))
    GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    assert not seen[-1]
    assert gc.isenabled()


def test_one_call(tiny_model, tmp_path, tokenizer, model):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arms = [ARM(tiny_model(seed=1), weight=0.5), ARM(tiny_model(seed=2), weight=-1.0)]
    (output,) = genarm_fast.generate(tmp_path, arms, "hi", seed=1, max_new_tokens=6)
    assert output.token_ids == model.generate("hi", seed=1, max_new_tokens=6)[0].token_ids


def test_outputs_come_as_they_are_complete(model, monkeypatch):
    lengths = [9, 2, 5, 1, 7]
    params = [SamplingParams(seed=i, max_new_tokens=n, n=1 + i % 2, ignore_eos=True) for i, n in enumerate(lengths)]
    prompts = [f"prompt {i}" for i in range(5)]
    together = model.generate(prompts, params)
    found = list(model.as_completed(prompts, params))
    assert [index for index, _ in found] == [3, 1, 2, 4, 0]
    for index, output in found:
        assert [each.token_ids for each in output.completions] == [
            each.token_ids for each in together[index].completions
        ]
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.as_completed("hi", max_new_tokens=0)  # raises at the call, before the first item is asked for


def test_a_request_that_fails_comes_as_its_error_and_a_left_iterator_frees_its_slots(model, monkeypatch):
    append = genarm_fast.engine.sequence.Sequence.append

    def failing(sequence, *drawn):
        append(sequence, *drawn)
        if sequence.request.index == 1:
            sequence.error = FloatingPointError("no")

    with monkeypatch.context() as patch:
        patch.setattr(genarm_fast.engine.sequence.Sequence, "append", failing)
        found = dict(model.as_completed(["a", "b", "c"], max_new_tokens=3, seed=1))
    assert isinstance(found[1], FloatingPointError)
    assert [found[i].token_ids for i in (0, 2)] == [
        each.token_ids for each in model.generate(["a", "c"], max_new_tokens=3, seed=1)
    ]
    outputs = model.as_completed(["a", "b"], [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 100)])
    assert next(outputs)[0] == 0
    assert len(model.engine().scheduler.running) == 1
    outputs.close()
    assert not model.engine().scheduler


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
    """Each member uses its own chat template, and a template with <s> gets no second <s>."""
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


def test_minimum_length(model):
    """No EOS or stop id appears before the minimum length, even when the bias wants nothing else."""
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
        "sampling_params: expected a SamplingParams, or 1, one per prompt, got 2",
    ),
    ("a", {"sampling_params": [{"n": 2}]}, TypeError, "sampling_params=.* expected a SamplingParams"),
    ("a", {"sampling_params": {"n": 2}}, TypeError, "sampling_params=.* expected a SamplingParams"),
    (["a", "\ud800"], {}, ValueError, r"prompts\[1\]=.*: expected Unicode text"),
    ([{"role": "user", "content": None}], {}, TypeError, r"prompts\[0\]: message .* expected a string as 'content'"),
    ("a", {"speculation": ["auto"]}, ValueError, r"speculation=\['auto'\]: expected"),
    (["a", "b"], {"sampling_params": [SamplingParams(), SamplingParams(weights=[1])]}, ValueError, r"prompts\[1\]: w"),
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


def test_one_of_several_chat_templates(tiny_model, tokenizer, monkeypatch):
    expected = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer).prepare(CHAT)[0].token_ids
    monkeypatch.setattr(tokenizer, "chat_template", {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"})
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    assert model.prepare(CHAT)[0].token_ids == expected
    assert model.score(CHAT, "b")[0].token_ids[-1] == 1


@pytest.mark.parametrize("template", ["{{ raise_exception('user first') }}", "{% for"])
def test_what_a_template_refuses_is_named(tiny_model, tokenizer, template):
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer, chat_template=template)
    with pytest.raises(ValueError, match=r"prompts\[1\]: base's chat template can't render it: (user|unexp)"):
        model.generate(["a", CHAT])


def test_prompts_that_only_the_draft_model_cannot_read(tiny_model, tokenizer):
    """The draft model may have fewer embeddings than the base, when ARMs narrow the vocabulary."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<more>"])
    model = GenARM.from_pretrained(
        tiny_model(vocab_size=301),
        ARM(tiny_model(seed=1), prompt_template="a{prompt}"),
        tokenizer=tokenizer,
        prompt_template="<more>{prompt}",
        draft_model=tiny_model(seed=2),
    )
    with pytest.raises(ValueError, match=r"prompts\[0\]: token id 300: expected less than 300, draft_model's vocab"):
        model.generate("b")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch_size": 2.5}, TypeError, "max_batch_size=2.5: expected an integer >= 1"),
        ({"base": "/no/folder", "max_batch_size": 0}, ValueError, "max_batch_size=0: expected an integer >= 1"),
        ({"cache_bytes": "1G"}, TypeError, "cache_bytes='1G': expected an integer >= 1 or None"),
        ({"base": "/no/folder", "speculation": "on"}, ValueError, "speculation='on': expected"),
        ({"arms": None}, TypeError, "arms=None: expected an ARM"),
        ({"max_batchsize": 4}, TypeError, "max_batchsize: expected no such argument where all members are loaded"),
        ({"base": ".", "ignore_mismatched_sizes": True}, TypeError, "ignore_mismatched_sizes: expected no such arg"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer='gpt2': expected a loaded tokenizer"),
        ({"prompt_template": 5}, TypeError, "base: prompt_template=5: expected a string"),
        ({"draft_model": 5}, TypeError, "draft_model=5: expected a hub id, a folder or a loaded model"),
        ({"base": None}, TypeError, "base=None: expected a hub id, a folder or a loaded model"),
        ({"base": torch.nn.Linear(3, 3)}, TypeError, "base: expected a causal LM of transformers, got Linear"),
    ],
)
def test_loading_refusals(tiny_model, tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        GenARM.from_pretrained(**{"base": tiny_model(), "tokenizer": tokenizer} | arguments)


@pytest.mark.parametrize(
    ("limit", "value", "error"),
    [("max_batch_size", 0, ValueError), ("max_batch_size", "4", TypeError), ("cache_bytes", -1, ValueError)],
)
def test_limits_set_by_hand_are_checked(tiny_model, tokenizer, limit, value, error):
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    setattr(model, limit, value)
    for run in (model.generate, model.stream, lambda prompt: model.score(prompt, "b")):
        with pytest.raises(error, match=f"{limit}={value!r}: expected an integer >= 1"):
            run("a")


def test_a_model_without_a_head_is_refused(tiny_model, tokenizer):
    with pytest.raises(TypeError, match="base: expected a causal LM of transformers, got LlamaModel"):
        GenARM.from_pretrained(tiny_model().model, tokenizer=tokenizer)


def test_nan_fails_alone(tokenizer, tiny_model):
    """The message names prompt and member, and the other requests of the batch keep their outputs."""
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
    """A mask by parameters is refused before any work; a mask by a processor fails at the token it masks."""
    with pytest.raises(ValueError, match=r"prompts\[0\]: allowed_token_ids, .*: expected a token that they leave"):
        model.generate("a", logit_bias=dict.fromkeys(range(300), -torch.inf))
    with pytest.raises(GenerationError, match=r"prompts\[0\]: every token is masked at token 0"):
        model.generate("a", logits_processors=[lambda ids, scores: torch.full_like(scores, -torch.inf)])


def failing_assert(ids, scores):
    raise AssertionError


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, scores: scores[0], r"returned \(300,\), expected scores of shape \(1, 300\)"),
        (lambda ids, scores: None, "returned None, expected scores"),
        (lambda ids, scores: scores > 0, r"returned \(1, 300\) of torch.bool, expected scores"),
        (lambda ids, scores: scores.to(torch.complex64), r"returned \(1, 300\) of torch.complex64, expected scores"),
        (lambda ids, scores: scores * torch.nan, r"returned NaN or \+inf"),
        (lambda ids, scores: {}["missing"], "prompts.1.: KeyError: 'missing'$"),
        (lambda ids, scores: next(iter(())), "prompts.1.: StopIteration$"),
        (failing_assert, "prompts.1.: AssertionError$"),
    ],
)
def test_a_bad_processor_fails_alone(model, processor, message):
    params = SamplingParams(max_new_tokens=3, seed=1, ignore_eos=True)
    with pytest.raises(GenerationError, match=message) as caught:
        model.generate([[5], [6]], [params, params.override(logits_processors=[processor])])
    assert caught.value.outputs[1] is None
    assert caught.value.outputs[0].token_ids == model.generate([5], params)[0].token_ids


def test_a_certain_token_has_a_log_probability_of_0(model):
    """Rounding would give 1.2e-7, whose exp is above 1."""
    params = {"allowed_token_ids": [5], "max_new_tokens": 12, "logprobs": 1, "rewards": True}
    (output,) = model.generate([5, 6], **params)
    for entry in output.logprobs:
        assert entry.logprob == 0.0
        assert entry.top == {5: 0.0}
    peaked = build_model("llama", 0)
    with torch.no_grad():
        peaked.lm_head.weight *= 1000
    (scored,) = GenARM.from_pretrained(peaked, peaked, tokenizer=model.tokenizer).score([[5, 6]], [list(range(7, 60))])
    assert max(*scored.base_logprobs, *scored.rewards["arm"].tokens) <= 0.0


def test_a_dict_is_strict_json(tiny_model, tokenizer):
    """The value -inf, for banned tokens and for tokens that an ARM masks, becomes None."""
    masking = build_model("llama", 1)
    masking.lm_head.bias = torch.nn.Parameter(torch.zeros(300).index_fill_(0, torch.tensor([6]), -torch.inf))
    model = GenARM.from_pretrained(tiny_model(), ARM(masking, name="arm", weight=0.0), tokenizer=tokenizer)
    params = {"allowed_token_ids": [6], "max_new_tokens": 1, "logprobs": 2, "rewards": True}
    (output,) = model.generate([5], **params)
    (completion,) = json.loads(json.dumps(output.to_dict(), allow_nan=False))["completions"]
    assert completion["logprobs"][0]["top"] == {"6": 0.0, "0": None}
    assert completion["rewards"] == {"arm": {"total": None, "tokens": [None]}}
    assert output.logprobs[0].top[0] == output.rewards["arm"].total == -torch.inf
    (scored,) = model.score([[5]], [[6]])
    assert json.loads(json.dumps(scored.to_dict(), allow_nan=False))["rewards"]["arm"]["tokens"] == [None]


def test_of_a_generation_config_the_ends_alone_count(tiny_model, tokenizer):
    """The rest is the request's to say, other than in Hugging Face's `generate`."""
    base = copy.deepcopy(tiny_model())
    request = {"prompts": "the cat", "seed": 5, "max_new_tokens": 8}
    expected = GenARM.from_pretrained(base, tokenizer=tokenizer).generate(**request)[0].token_ids
    assert len(set(expected[:4])) == 4
    base.generation_config.update(
        eos_token_id=[1, expected[3], 299], suppress_tokens=expected[:1], forced_bos_token_id=7, min_new_tokens=6,
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=9.0, no_repeat_ngram_size=1, max_new_tokens=2,
    )  # fmt: skip
    model = GenARM.from_pretrained(base, tokenizer=tokenizer)
    assert model.eos_token_ids == {1, expected[3], 299}
    (output,) = model.generate(**request)
    assert (output.token_ids, output.finish_reason) == (expected[:4], "stop")


def test_flags(model):
    """NumPy's and PyTorch's are flags as well; what else is true in Python may be a mistake, such as "no"."""
    params = SamplingParams(rewards=numpy.True_, ignore_eos=torch.tensor(True), skip_special_tokens=numpy.False_)
    assert (params.rewards, params.ignore_eos, params.skip_special_tokens) == (True, True, False)
    assert ARM("a", trust_remote_code=numpy.True_).trust_remote_code is True
    (whole,), (cut,) = (model.score("a", "b", append_eos=flag) for flag in (numpy.True_, numpy.False_))
    assert (len(whole.token_ids), len(cut.token_ids)) == (2, 1)
    for flag in ("no", 1, None, numpy.array([True])):
        with pytest.raises(TypeError, match=r"append_eos=.*: expected True or False"):
            model.score("a", "b", append_eos=flag)
        with pytest.raises(TypeError, match=r"progress=.*: expected True or False"):
            model.generate("a", max_new_tokens=1, progress=flag)
        with pytest.raises(TypeError, match=r"trust_remote_code=.*: expected True or False"):
            ARM("a", trust_remote_code=flag)
    with pytest.raises(TypeError, match=r"rewards=1: expected True or False"):
        SamplingParams(rewards=1)


@pytest.mark.parametrize("scalar", [torch.tensor, numpy.array], ids=["tensor", "array"])
def test_numbers_in_tensors_and_arrays(model, scalar):
    """Such values come without dimensions, as `list(ids)`, `weights[0]` and `probs.mean()` give them."""
    plain = {"temperature": 0.5, "top_k": 40, "seed": 7, "max_new_tokens": 6, "logit_bias": {3: 2.0}}
    expected = model.generate([5, 6, 7], weights=[1.0, 0.5], stop_token_ids=[9], **plain)[0].token_ids
    given = {name: scalar(value) for name, value in plain.items() if name != "logit_bias"}
    given["logit_bias"] = {3: scalar(2.0)}
    prompt = [scalar(token) for token in (5, 6, 7)]
    for prompts in (prompt, [prompt]):
        output = model.generate(prompts, weights=[scalar(1.0), scalar(0.5)], stop_token_ids=[scalar(9)], **given)[0]
        assert output.token_ids == expected
    assert model.score([prompt], [prompt])[0].base_logprobs == model.score([[5, 6, 7]], [[5, 6, 7]])[0].base_logprobs
    with pytest.raises(TypeError, match="top_k=True"):
        SamplingParams(top_k=scalar(True))
    with pytest.raises(TypeError, match=r"temperature=.*expected a finite number"):
        SamplingParams(temperature=scalar([0.5]))
