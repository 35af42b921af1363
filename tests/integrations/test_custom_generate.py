"""`model.generate(..., custom_generate=guided(arms))`: texts equal the reference's, options work as in transformers."""

from __future__ import annotations

import threading

import pytest
import torch
from guided_rows import PAD, PROMPTS, WEIGHTS, padded
from peft import LoraConfig, get_peft_model
from tiny_models import build_model, save_adapter
from transformers import (
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation import LogitNormalization, logits_process

from genarm_fast import ARM, GenARM, GenerationError, reference
from genarm_fast.engine.sequence import sample_seed
from genarm_fast.engine.stream import StreamChunk
from genarm_fast.integrations.custom_generate import _lockstep
from genarm_fast.integrations.generation_params import ROW_BY_ROW, translated
from genarm_fast.integrations.transformers import GenARMLogitsProcessor, guided
from genarm_fast.speculation.config import Speculation


@pytest.fixture
def arms(tiny_model):
    return [ARM(tiny_model(seed=1), weight=0.5, name="a"), ARM(tiny_model(seed=2), weight=-1.0, name="b")]


@pytest.fixture
def guide(arms, padded_tokenizer):
    return guided(arms, tokenizer=padded_tokenizer, speculation="off")


def expected(base, arms, prompt, seed=0, **params):
    params = {"max_new_tokens": 12, "stop_token_ids": [1], "weights": WEIGHTS, **params}
    models = [arm.model for arm in arms]
    return reference.generate(base, models, [prompt] * 3, seed=seed, **params).tokens


def rows(output, prompts=PROMPTS, eos=1):
    """Return the tokens after each prompt, up to the first end token."""
    found = output[:, max(map(len, prompts)) :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in found]


CALLS = {
    "greedy": ({"do_sample": False}, {"temperature": 0.0}),
    "plain": ({}, {}),
    "warpers": (
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ),
    "penalty and bans": (
        {"repetition_penalty": 1.4, "min_new_tokens": 9, "suppress_tokens": [5, 6, 7, 10**6], "top_k": 0},
        {"repetition_penalty": 1.4, "min_new_tokens": 9, "suppress_tokens": [5, 6, 7]},
    ),
    "two ends": ({"eos_token_id": [1, 20, 21, 22, 23, 24, -1]}, {"stop_token_ids": [1, 20, 21, 22, 23, 24]}),
}


@pytest.mark.parametrize("call", CALLS)
def test_tokens_are_those_of_the_reference(call, base, arms, guide):
    """Rows of three lengths are padded on the left, with two texts per prompt and the seeds of `n` completions."""
    given, params = CALLS[call]
    given = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "num_return_sequences": 2} | given
    if not given["do_sample"]:
        given["num_return_sequences"] = 1
    inputs = padded(PROMPTS)
    output = base.generate(**inputs, custom_generate=guide, seed=7, **given)
    copies = given["num_return_sequences"]
    ends = params.get("stop_token_ids", [1])
    assert output.dtype == torch.int64
    assert not output.is_inference()
    assert torch.equal(output[:, :6], inputs["input_ids"].repeat_interleave(copies, 0))
    for r, row in enumerate(output[:, 6:].tolist()):
        text = expected(base, arms, PROMPTS[r // copies], sample_seed(7, r % copies), **params)
        assert row == text + [PAD] * (len(row) - len(text))
        assert len(text) == 12 or text[-1] in ends
    longest = max(len(expected(base, arms, p, sample_seed(7, i), **params)) for p in PROMPTS for i in range(copies))
    assert output.shape[1] == 6 + longest


def test_what_the_engine_has_no_word_for_is_called_as_transformers_calls_it(base, arms, guide, padded_tokenizer):
    """Greedy texts equal those of transformers' own loop with the guide as its first processor."""
    ways = [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [9, 10]]},
        {"sequence_bias": {(40,): 3.0, (41, 42): -4.0}, "repetition_penalty": 1.3},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"forced_eos_token_id": 1, "max_new_tokens": 7},
        {"begin_suppress_tokens": list(range(150))},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 40 + row, 60 + len(ids), 1]},
        {"min_length": 12},
        {"renormalize_logits": True, "remove_invalid_values": True},
    ]
    processor = GenARMLogitsProcessor(base, arms, tokenizer=padded_tokenizer)
    seen = set()
    for way in ways:
        given = {**padded(PROMPTS), "do_sample": False, "max_new_tokens": 12, **way}
        found = rows(base.generate(**given, custom_generate=guide))
        prepared: list = []

        def loop(model, input_ids, logits_processor, prepared=prepared, **rest):
            prepared += [type(each) for each in logits_processor]
            first = [processor, LogitNormalization(), *logits_processor]
            return model._sample(input_ids, type(logits_processor)(first), **rest)

        by_hand = base.generate(**given, custom_generate=loop)
        assert found == rows(by_hand), way
        seen |= set(prepared)
    assert len(seen & set(ROW_BY_ROW)) >= 8


@pytest.mark.parametrize("warper", [{"typical_p": 0.5}, {"top_h": 0.4}, {"epsilon_cutoff": 0.02}, {"eta_cutoff": 0.02}])
def test_other_warpers_keep_their_place_behind_the_temperature(warper, base, arms, guide):
    kinds = {"typical_p": "Typical", "top_h": "TopH", "epsilon_cutoff": "Epsilon", "eta_cutoff": "Eta"}
    (name,) = warper
    kind = getattr(logits_process, kinds[name] + "LogitsWarper")
    warp = kind(warper[name], device="cpu") if name == "eta_cutoff" else kind(warper[name])
    given = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 12, **warper}
    chain = [logits_process.TemperatureLogitsWarper(0.6), warp]
    if name != "top_h":
        chain.insert(1, logits_process.TopKLogitsWarper(50))
        params = {}
    else:
        params = {"top_k": 50}
    found = rows(base.generate(**padded(PROMPTS), custom_generate=guide, seed=3, **given))
    assert found == [expected(base, arms, p, seed=3, logits_processors=chain, **params) for p in PROMPTS]


def test_own_processors_see_the_row_as_transformers_shows_it(base, arms, guide, padded_tokenizer):
    class Own(LogitsProcessor):
        def __init__(self):
            self.lengths = []

        def __call__(self, input_ids, scores):
            self.lengths.append(tuple(input_ids.shape))
            return scores.index_fill(1, input_ids[0, 6:], -torch.inf)  # no token twice after the padded prompt

    given = {"do_sample": False, "max_new_tokens": 8}
    own = Own()
    one = {name: value[1:2] for name, value in padded(PROMPTS).items()}  # four padding tokens
    (found,) = rows(base.generate(**one, custom_generate=guide, logits_processor=[own], **given))
    assert own.lengths == [(1, 6 + i) for i in range(len(found))]
    assert len(set(found)) == len(found)
    with pytest.raises(ValueError, match="logits_processor: Own would see each of the 3 rows by itself"):
        base.generate(**padded(PROMPTS), custom_generate=guide, logits_processor=[Own()], **given)
    unlike = [lambda ids, scores: scores.index_fill(1, ids[0], -torch.inf)]
    row_by_row = guided(arms, tokenizer=padded_tokenizer, logits_processors=unlike)
    for row, prompt in zip(rows(base.generate(**padded(PROMPTS), custom_generate=row_by_row, **given)), PROMPTS):
        assert len({*row, *prompt}) == len(row) + len(set(prompt))


class After(StoppingCriteria):
    """A criterion that ends row r after its ends[r]-th new token, reading all rows together as criteria may."""

    def __init__(self, ends, width):
        self.ends, self.width, self.calls = ends, width, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.clone())
        return torch.tensor([input_ids.shape[1] - self.width >= end for end in self.ends])


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_own_criteria_see_all_rows_step_by_step(speculation, base, arms, padded_tokenizer):
    plan = "off" if speculation == "off" else Speculation(drafter="ngram", k=3)
    guide = guided(arms, tokenizer=padded_tokenizer, speculation=plan)
    given = {**padded(PROMPTS), "do_sample": False, "max_new_tokens": 12, "custom_generate": guide}
    whole = base.generate(**given, eos_token_id=1, min_new_tokens=12)
    after = After([2, 5, 4], 6)
    found = base.generate(**given, eos_token_id=1, min_new_tokens=12, stopping_criteria=[after])
    assert found.shape[1] == 6 + 5
    for r, end in enumerate(after.ends):
        assert found[r, 6:].tolist() == whole[r, 6 : 6 + end].tolist() + [PAD] * (5 - end)
    assert [tuple(each.shape) for each in after.calls] == [(3, 7 + i) for i in range(5)]
    assert all(torch.equal(each, found[:, : each.shape[1]]) for each in after.calls)

    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return False  # lm-eval's criterion returns False too

    assert torch.equal(base.generate(**given, eos_token_id=1, min_new_tokens=12, stopping_criteria=[Never()]), whole)
    text = padded_tokenizer.decode(whole[0, 8:9])
    stop = StopStringCriteria(padded_tokenizer, [text])
    found = base.generate(**given, eos_token_id=1, min_new_tokens=12, stopping_criteria=[stop])
    assert text in padded_tokenizer.decode(found[0, 6:9])


def test_stop_strings_and_parameters_of_its_own(base, arms, padded_tokenizer):
    given = {**padded(PROMPTS[:1]), "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    (whole,) = rows(base.generate(**given, custom_generate=guided(arms, tokenizer=padded_tokenizer)))
    stop = padded_tokenizer.decode(whole[3:4])
    own = guided(arms, tokenizer=padded_tokenizer, stop=stop, frequency_penalty=0.5, logit_bias={whole[0]: -1e4})
    (found,) = rows(base.generate(**given, custom_generate=own))
    bias = {"logit_bias": {whole[0]: -1e4}, "frequency_penalty": 0.5, "min_new_tokens": 12}
    text = expected(base, arms, PROMPTS[0], temperature=0.0, **bias)
    assert found == text[: len(found)]
    ends = guided(arms, tokenizer=padded_tokenizer, stop_token_ids=[whole[4]])
    (found,) = rows(base.generate(**given | {"min_new_tokens": 0, "eos_token_id": None}, custom_generate=ends))
    assert found[-1] == whole[4]
    assert len(found) <= 5


def test_weights_and_seeds_of_a_call(base, arms, guide):
    given = {**padded(PROMPTS), "do_sample": True, "top_k": 0, "max_new_tokens": 12, "custom_generate": guide}
    found = rows(base.generate(**given, seed=5, weights={"b": 2.0}))
    assert found == [expected(base, arms, prompt, 5, weights=[0.5, 2.0]) for prompt in PROMPTS]
    assert found != rows(base.generate(**given, seed=5))
    torch.manual_seed(1)
    first, second = base.generate(**given), base.generate(**given)
    torch.manual_seed(1)
    assert torch.equal(base.generate(**given), first)
    assert first.shape != second.shape or not torch.equal(first, second)
    with pytest.raises(ValueError, match="weights: 'c': expected 'a', 'b'"):
        base.generate(**given, weights={"c": 1.0})


def test_drafts_change_nothing(base, arms, padded_tokenizer):
    given = {**padded(PROMPTS), "do_sample": True, "max_new_tokens": 20, "seed": 11}
    texts = [
        base.generate(**given, custom_generate=guided(arms, tokenizer=padded_tokenizer, speculation=plan))
        for plan in ("off", "auto", Speculation(drafter="a", k=3))
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def test_an_adapter_of_the_users_own_model(tmp_path, padded_tokenizer):
    """The adapter is a lane over the user's own weights, which stay unchanged."""
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    padded_tokenizer.save_pretrained(tmp_path / "base")
    merged = save_adapter(tmp_path / "adapter", base=tmp_path / "base", seed=2)
    base = type(merged).from_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    guide = guided(tmp_path / "adapter", weights=0.7)
    found = rows(base.generate(**padded(PROMPTS), custom_generate=guide, do_sample=False, max_new_tokens=12))
    run = {"temperature": 0.0, "max_new_tokens": 12, "stop_token_ids": [1]}
    assert found == [reference.generate(base, [merged], [p] * 2, [0.7], **run).tokens for p in PROMPTS]
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_base_that_peft_has_replaced_is_refused(base, guide):
    own = build_model("llama", 0)
    wrapped = get_peft_model(own, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="base"):
        wrapped.generate(**padded(PROMPTS), custom_generate=guide, max_new_tokens=3)


def test_prompts_are_read_by_each_arm_in_its_own_format(base, tiny_model, padded_tokenizer):
    arm = ARM(tiny_model(seed=1), prompt_template="Q: {prompt}\nA:")
    guide = guided(arm, tokenizer=padded_tokenizer)
    texts = ["the cat", "a man and the sea"]
    inputs = padded_tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    run = {"do_sample": False, "max_new_tokens": 10}
    found = base.generate(**inputs, custom_generate=guide, prompts=texts, **run)
    engine = GenARM.from_pretrained(base, arm, tokenizer=padded_tokenizer)
    texts_of_engine = [each.token_ids for each in engine.generate(texts, temperature=0.0, max_new_tokens=10)]
    width = inputs["input_ids"].shape[1]
    assert [row[: len(text)] for row, text in zip(found[:, width:].tolist(), texts_of_engine)] == texts_of_engine
    assert not torch.equal(found, base.generate(**inputs, custom_generate=guide, **run))
    with pytest.raises(ValueError, match=r"prompts\[1\]: the base reads .* not the .* of input_ids\[1\]"):
        base.generate(**inputs, custom_generate=guide, prompts=[texts[0], "else"], **run)
    with pytest.raises(ValueError, match="prompts: expected 2, one for each row"):
        base.generate(**inputs, custom_generate=guide, prompts=texts[0], **run)


def test_streamers_are_taken_at_construction(base, arms, padded_tokenizer, capsys):
    one = padded(PROMPTS[:1])
    run = {"do_sample": False, "max_new_tokens": 12}
    streamer = TextIteratorStreamer(padded_tokenizer, skip_prompt=True, timeout=60)
    guide = guided(arms, tokenizer=padded_tokenizer, streamer=streamer)
    kept = {}
    thread = threading.Thread(target=lambda: kept.update(out=base.generate(**one, custom_generate=guide, **run)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == padded_tokenizer.decode(kept["out"][0, 6:])
    # transformers passes `generate`'s streamer to no callable; if that changes, this test fails.
    seen = {}

    def custom(model, input_ids, logits_processor, streamer=None, **rest):
        seen.update(streamer=streamer, rest=rest)
        return input_ids

    base.generate(**one, custom_generate=custom, streamer=TextStreamer(padded_tokenizer), **run)
    assert seen["streamer"] is None
    assert not any("streamer" in name for name in seen["rest"])
    capsys.readouterr()
    guide = guided(arms, tokenizer=padded_tokenizer, streamer=TextStreamer(padded_tokenizer))
    with pytest.raises(ValueError, match="batch size 1"):
        base.generate(**padded(PROMPTS), custom_generate=guide, **run)
    with pytest.raises(TypeError, match="streamer='yes': expected one of transformers' streamers"):
        guided(arms, streamer="yes")


def test_pipeline(base, arms, guide, padded_tokenizer):
    pipe = pipeline("text-generation", model=base, tokenizer=padded_tokenizer)
    texts = ["the cat sat", "a man and the sea"]
    given = {"do_sample": False, "max_new_tokens": 10, "return_full_text": False}
    found = pipe(texts, batch_size=2, custom_generate=guide, **given)
    ids = [padded_tokenizer(text)["input_ids"] for text in texts]
    tokens = [expected(base, arms, each, temperature=0.0, max_new_tokens=10) for each in ids]
    assert [each[0]["generated_text"] for each in found] == [
        padded_tokenizer.decode(each, skip_special_tokens=True) for each in tokens
    ]


def test_return_dict(base, guide):
    given = {**padded(PROMPTS), "do_sample": False, "max_new_tokens": 5, "custom_generate": guide}
    output = base.generate(**given, return_dict_in_generate=True)
    assert torch.equal(output.sequences, base.generate(**given))
    assert output.scores is None
    assert output.past_key_values is None


REFUSED = [
    ({"num_beams": 3}, "num_beams=3: expected 1 .* GenARMLogitsProcessor"),
    ({"return_dict_in_generate": True, "output_scores": True}, "output_scores=True: expected False"),
    ({"return_dict_in_generate": True, "output_logits": True}, "output_logits=True: expected False"),
    ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states=True: expected False"),
    ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state of its own"),
    ({"seed": -1}, "seed=-1"),
    ({"weights": [1.0]}, "weights=.*expected 2 numbers"),
    ({"position_ids": torch.arange(6).expand(3, 6) + 1}, "position_ids: expected none"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda each: str(next(iter(each)))[:30])
def test_refusals(given, message, base, guide):
    with pytest.raises(ValueError, match=message):
        base.generate(**padded(PROMPTS), custom_generate=guide, max_new_tokens=4, **given)


def test_options_that_are_none(arms):
    with pytest.raises(TypeError, match=r"temperature: expected one of allowed_token_ids, .* said to `generate`"):
        guided(arms, temperature=0.5)
    with pytest.raises(TypeError, match="frequency_penalty='x'"):
        guided(arms, frequency_penalty="x")


def test_a_row_that_fails_is_an_error(base, guide):
    nothing = [lambda ids, scores: scores * 0 - torch.inf]
    given = {**padded(PROMPTS[:1]), "custom_generate": guide, "logits_processor": nothing, "max_new_tokens": 3}
    with pytest.raises(GenerationError, match=r"prompts\[0\]: .*every token is masked"):
        base.generate(**given)


def plan_of(*processors):
    given = {"do_sample": True, "width": 3, "rows": 1, "vocab_size": 300, "also_stop": ()}
    return translated(processors, [MaxLengthCriteria(9)], **given)


def test_a_class_of_the_users_own_is_called_whatever_it_derives_from():
    class Mine(MinLengthLogitsProcessor):
        pass

    mine = Mine(8, torch.tensor([1]), device="cpu")
    assert plan_of(mine).processors == [mine]
    assert "min_new_tokens" not in plan_of(mine).params


def test_warpers_in_another_order_are_called_in_that_order():
    """Only the last warpers, if the sampling kernel applies them in the same order, become its parameters."""
    cold, nucleus, penalty = (
        logits_process.TemperatureLogitsWarper(0.5),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.RepetitionPenaltyLogitsProcessor(1.5),
    )
    plan = plan_of(penalty, cold, nucleus, LogitNormalization())
    assert (plan.processors, plan.params["temperature"], plan.params["top_p"]) == ([], 0.5, 0.9)
    plan = plan_of(penalty, nucleus, cold)
    assert (plan.processors, plan.params["temperature"], plan.params.get("top_p")) == ([nucleus], 0.5, None)
    plan = plan_of(cold, nucleus, penalty)
    assert (plan.processors, plan.params["temperature"]) == ([cold, nucleus, penalty], 1.0)
    plan = plan_of(penalty, penalty)
    assert (plan.processors, plan.params["repetition_penalty"]) == ([penalty], 1.5)


def test_a_row_that_is_closed_says_nothing_more():
    """A step with drafts may already have brought several tokens of the row."""
    chunks = [StreamChunk("", [5, 6, 7], [], 0), StreamChunk("", [8], [], 1), StreamChunk("", [9], [], 1, "length")]
    closed: set[int] = set()
    steps = _lockstep(iter(chunks), 2, PAD, closed)
    assert next(steps) == [5, 8]
    closed.add(0)
    assert list(steps) == [[PAD, 9]]
