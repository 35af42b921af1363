"""The logits processor inside Hugging Face's `generate`: every score against plain forwards over whole rows."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from tiny_models import build_model, build_tokenizer, save_adapter
from transformers import LogitNormalization, LogitsProcessor, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from genarm_fast import ARM, GenARM, reference
from genarm_fast.integrations import transformers as integration
from genarm_fast.integrations.transformers import GenARMLogitsProcessor

PAD = 2
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [9, 8, 7]]
WEIGHTS = [0.5, -1.0]


@pytest.fixture(scope="module")
def padded_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.pad_token_id = PAD
    return tokenizer


@pytest.fixture
def base(tiny_model) -> PreTrainedModel:
    base = tiny_model()
    base.generation_config.pad_token_id = PAD
    return base


@pytest.fixture
def guide(base, tiny_model, padded_tokenizer) -> GenARMLogitsProcessor:
    arms = [ARM(tiny_model(seed=1), weight=0.5), ARM(tiny_model(seed=2), weight=-1.0)]
    return GenARMLogitsProcessor(base, arms, tokenizer=padded_tokenizer)


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


class Counted:
    """A model, and how many tokens a row it was fed."""

    def __init__(self, inner: PreTrainedModel) -> None:
        self.inner, self.columns = inner, 0

    def __call__(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        self.columns += input_ids.shape[1]
        return self.inner(input_ids=input_ids, **kwargs)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()


class Checked(LogitsProcessor):
    """Compares what a processor gives with plain forwards of every row."""

    def __init__(self, guide: GenARMLogitsProcessor) -> None:
        self.guide, self.steps = guide, 0
        self.models = [member.model for member in guide.members]
        self.counted = guide.members[1].model = Counted(self.models[1])

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        given = self.guide(input_ids, scores)
        for row, own, found in zip(input_ids.tolist(), scores, given):
            start = next(i for i, token in enumerate(row) if token != PAD)
            arms = [model(torch.tensor([row[start:]])).logits[0, -1] for model in self.models[1:]]
            expected = own.log_softmax(-1)
            for arm, weight in zip(arms, self.guide.weights):
                expected = expected + weight * arm.log_softmax(-1)
            assert torch.allclose(found, expected, atol=2e-4), (row, (found - expected).abs().max())
        self.steps += 1
        return given


def generate(
    base: PreTrainedModel,
    guide: LogitsProcessor | list[LogitsProcessor],
    prompts: Sequence[Sequence[int]],
    **kwargs: object,
):
    """The tokens after each prompt, up to the first </s>."""
    inputs = padded(prompts)
    kwargs = {"do_sample": False, "max_new_tokens": 12, **kwargs}
    processors = guide if isinstance(guide, list) else [guide]
    rows = base.generate(**inputs, logits_processor=processors, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


FAMILIES = ["llama", "gpt2", "mistral", "qwen3", "gemma2", "gemma3_text"]  # windows of 8 tokens in three of them


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_the_engine_and_of_the_reference(family, tiny_model, padded_tokenizer):
    base, arms = tiny_model(family), [tiny_model(family, seed=1), tiny_model("llama", seed=2)]
    base.generation_config.pad_token_id = PAD
    guide = GenARMLogitsProcessor(base, arms, weights=WEIGHTS, tokenizer=padded_tokenizer)
    found = generate(base, guide, PROMPTS)
    engine = GenARM.from_pretrained(base, arms, tokenizer=padded_tokenizer)
    run = {"temperature": 0.0, "max_new_tokens": 12}
    assert found == [output.token_ids for output in engine.generate(PROMPTS, weights=WEIGHTS, **run)]
    for prompt, tokens in zip(PROMPTS, found):
        assert tokens == reference.generate(base, arms, [prompt] * 3, WEIGHTS, stop_token_ids=[1], **run).tokens
    assert found != generate(base, guide.__class__(base, [], tokenizer=padded_tokenizer), PROMPTS)


WAYS = {
    "batch": {},
    "one": {"prompts": PROMPTS[:1]},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompts": [[5, 6, 7, 5, 6, 7, 5, 6]], "prompt_lookup_num_tokens": 3},
    "assistant": {"prompts": PROMPTS[:1], "assistant": 3},
    "sampled assistant": {"prompts": PROMPTS[:1], "assistant": 3, "do_sample": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_score_is_that_of_plain_forwards(way, guide, base, tiny_model):
    torch.manual_seed(0)
    checked, kwargs = Checked(guide), dict(WAYS[way])
    prompts = kwargs.pop("prompts", PROMPTS)
    if "assistant" in kwargs:
        kwargs["assistant_model"] = tiny_model(seed=kwargs.pop("assistant"))
    generate(base, checked, prompts, **kwargs)
    assert checked.steps >= 12
    longest = max(map(len, prompts))
    if "assistant_model" not in kwargs and "prompt_lookup_num_tokens" not in kwargs:
        assert checked.counted.columns == longest + checked.steps - 1  # each token once


def test_an_assistant_changes_nothing(guide, base, tiny_model):
    plain = generate(base, guide, PROMPTS[:1])
    assert generate(base, guide, PROMPTS[:1], assistant_model=tiny_model(seed=3)) == plain
    assert generate(base, guide, PROMPTS[:1], prompt_lookup_num_tokens=2) == plain


def test_calls_after_calls(guide, base):
    """Fewer rows, more rows, the same again are read anew; of one that goes on, only what is new."""
    checked = Checked(guide)

    def fed(prompts: Sequence[Sequence[int]], new: int) -> int:
        before, steps = checked.counted.columns, checked.steps
        generate(base, checked, prompts, max_new_tokens=new, min_new_tokens=new)
        assert checked.steps == steps + new
        return checked.counted.columns - before

    for prompts in (PROMPTS, PROMPTS[:1], [[20, 21], *PROMPTS], PROMPTS[::-1], [*PROMPTS[::-1], PROMPTS[0]]):
        assert fed(prompts, 4) == 6 + 4 - 1
    (text,) = generate(base, checked, PROMPTS[:1])
    longer = [*PROMPTS[0], *text, 30, 31]
    assert fed([longer], 4) == 3 + 4 - 1  # the last token of a text was not fed
    (text,) = generate(base, checked, [longer])
    longer = [*longer, *text, 40]
    assert fed([longer, longer[::-1]], 4) == len(longer) + 4 - 1  # one of them doesn't go on


def test_an_arm_may_be_trained_between_calls(base, padded_tokenizer):
    arm = build_model("llama", 1)
    checked = Checked(GenARMLogitsProcessor(base, arm, tokenizer=padded_tokenizer))
    first = generate(base, checked, PROMPTS)
    for parameter in arm.parameters():
        parameter.data *= 1.5
    assert generate(base, checked, PROMPTS) != first
    arm.model.norm.weight.data *= 1.5
    generate(base, checked, [[*PROMPTS[0][:4], 30, 31, 32, 33]])


def test_faults_would_be_seen(guide, base, monkeypatch):
    """Rows that were reordered and are taken for their own; caches that are taken for those of another prompt."""
    right = integration.parents_of

    def in_place(tokens, rows):
        parents, kept = right(tokens, rows)
        return list(range(len(parents))), kept

    monkeypatch.setattr(integration, "parents_of", in_place)
    with pytest.raises(AssertionError):
        generate(base, Checked(guide), PROMPTS, num_beams=4)

    def by_length(tokens, rows):
        return right(tokens, rows)[0], min(tokens.shape[1] - 1, rows.shape[1])

    guide.release()
    generate(base, Checked(guide), PROMPTS[:1])
    monkeypatch.setattr(integration, "parents_of", by_length)
    with pytest.raises(AssertionError):
        generate(base, Checked(guide), [[5, 6, 30, 31, 32, 33, 34, 35]])


def test_a_forward_that_failed_leaves_nothing_behind(guide, base, monkeypatch):
    first = generate(base, guide, PROMPTS)
    arm = guide.members[1].model
    with monkeypatch.context() as patch:
        patch.setattr(arm.lm_head, "forward", lambda x: 1 / 0)  # the cache has grown by then
        with pytest.raises(ZeroDivisionError):
            guide(torch.tensor([[5, 6, 7]]), torch.zeros(1, 300))
    assert generate(base, Checked(guide), PROMPTS) == first


def test_weights_change_between_tokens(guide, base, tiny_model):
    class Steered(Checked):
        def __call__(self, input_ids, scores):
            self.guide.weights = weights(self.steps)
            return super().__call__(input_ids, scores)

    def weights(step: int) -> list[float]:
        return [0.0, 2.0] if step < 5 else [3.0, 0.0]  # an ARM of weight 0 doesn't run, and catches up later

    found = generate(base, Steered(guide), PROMPTS[:1])[0]
    arms = [tiny_model(seed=1), tiny_model(seed=2)]
    run = {"temperature": 0.0, "max_new_tokens": 12, "stop_token_ids": [1]}
    assert found == reference.generate(base, arms, [PROMPTS[0]] * 3, weights, **run).tokens
    for wrong in ([1.0], [1.0, math.nan], "1"):
        with pytest.raises((ValueError, TypeError), match="weights="):
            guide.weights = wrong
    guide.weights = 2
    assert guide.weights == (2.0, 2.0)


def test_warpers_act_on_the_combination(guide, base, tiny_model):
    torch.manual_seed(1)
    warp = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "do_sample": True}
    output = base.generate(torch.tensor([PROMPTS[0]]), logits_processor=[guide], **warp, **options)
    for step, scores in enumerate(output.scores):
        row = output.sequences[:, : len(PROMPTS[0]) + step]
        logits = [model(row).logits[0, -1].detach() for model in (base, tiny_model(seed=1), tiny_model(seed=2))]
        expected = reference.guided_probs(logits[0], logits[1:], WEIGHTS, **warp)
        assert torch.allclose(scores[0].double().softmax(-1), expected, atol=1e-4)
        assert 1 < int((expected > 0).sum()) <= 40 or step


def test_penalties_after_it_are_those_of_the_engine(guide, base):
    """On normalised log-probabilities; before it, which is where `generate` puts its own, they are others."""
    engine = GenARM(guide.members)
    run = {"temperature": 0.0, "max_new_tokens": 12, "repetition_penalty": 1.3}
    expected = [output.token_ids for output in engine.generate(PROMPTS, **run)]
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    after, before = [guide, LogitNormalization(), penalty], [penalty, guide]
    assert [generate(base, after, [prompt])[0] for prompt in PROMPTS] == expected
    assert [generate(base, before, [prompt])[0] for prompt in PROMPTS] != expected


@pytest.mark.parametrize("prompts", [["the cat", "there is no place", "a"], [[{"role": "user", "content": "hi"}]] * 2])
def test_arms_with_templates_of_their_own(prompts, base, tiny_model, padded_tokenizer):
    """Padded each in its own way."""
    own = ARM(tiny_model(seed=1), prompt_template="Q: {prompt} A:", chat_template="{{ messages[0].content }}? ")
    arms = [own, ARM(tiny_model(seed=2), weight=-0.5)]
    guide = GenARMLogitsProcessor(base, arms, tokenizer=padded_tokenizer)
    engine = GenARM.from_pretrained(base, arms, tokenizer=padded_tokenizer)
    expected = [o.token_ids for o in engine.generate(prompts, temperature=0.0, max_new_tokens=12)]
    for copies in (1, 2):
        inputs = guide.start(prompts)
        beams = {"num_beams": 2, "num_return_sequences": 2} if copies == 2 else {}
        rows = base.generate(**inputs, logits_processor=[guide], do_sample=False, max_new_tokens=12, **beams)
        if not beams:
            rows = [row[inputs["input_ids"].shape[1] :].tolist() for row in rows]
            assert [row[: row.index(1) + 1] if 1 in row else row for row in rows] == expected
    shared = base.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert shared[0, inputs["input_ids"].shape[1] :].tolist() != expected[0]
    with pytest.raises(ValueError, match=r"begin with the prompts of the last start\(\)"):
        generate(base, guide, PROMPTS)
    guide.release()
    generate(base, Checked(guide), PROMPTS)


def test_vocabularies_of_different_width(tiny_model, padded_tokenizer):
    """Only common tokens are drawn; a pad token that an ARM has no embedding of may fill rows that have ended."""
    base, arm = tiny_model(vocab_size=320), tiny_model(seed=1, vocab_size=304)
    base.generation_config.pad_token_id = 310
    base.generation_config.eos_token_id = list(range(3, 150))
    guide = GenARMLogitsProcessor(base, arm, weights=0.7, tokenizer=padded_tokenizer, pad_token_id=310)
    own = torch.randn(2, 320, generator=torch.Generator().manual_seed(0))
    scores = guide(torch.tensor([[310, 310, 155], [160, 170, 180]]), own)
    for row, mine, found in zip(([155], [160, 170, 180]), own, scores):
        theirs = arm(torch.tensor([row])).logits[0, -1, :300].detach()
        expected = mine[:300].log_softmax(-1) + 0.7 * theirs.log_softmax(-1)
        assert torch.allclose(found, torch.cat([expected, torch.full((20,), -torch.inf)]), atol=1e-4)

    torch.manual_seed(0)
    inputs = torch.randint(150, 300, (6, 3))
    rows = base.generate(inputs, logits_processor=[guide], do_sample=True, max_new_tokens=40)
    assert bool((rows[:, 3:-1] == 310).any())
    assert int(rows[rows != 310].max()) < 300
    with pytest.raises(ValueError, match="token id 305: expected less than 304, arm's vocabulary"):
        guide(torch.tensor([[5, 305]]), torch.zeros(1, 320))


def test_masked_tokens_stay_masked(guide, monkeypatch):
    """By the base or an ARM that runs, whatever the sign of its weight."""

    def given(weights: Sequence[float], *masked: int) -> list[int]:
        guide.weights, scores = weights, torch.zeros(1, 300)
        scores[0, masked] = -torch.inf
        result = guide(torch.tensor([PROMPTS[0]]), scores)
        return (result == -torch.inf).nonzero()[:, 1].tolist()

    assert given([0.5, -1.0], 7, 9) == [7, 9]
    head = guide.members[2].model.lm_head
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: forward(x).index_fill(-1, torch.tensor([11]), -torch.inf))
    assert given([0.5, -1.0], 7) == [7, 11]
    assert given([0.5, 1.0], 7) == [7, 11]
    assert given([0.5, 0.0], 7) == [7]
    monkeypatch.setattr(head, "forward", lambda x: forward(x) * math.nan)
    assert given([0.5, 0.0], 7) == [7]
    for fault in ([[0.5, 1.0]], [[0.5, 0.0], *range(300)]):
        with pytest.raises(ValueError, match="expected no NaN, and in every row a token"):
            given(*fault)


def test_an_adapter_shares_the_weights_of_the_base(tmp_path):
    base = build_model("llama", 0)
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    merged = save_adapter(tmp_path / "adapter", base=tmp_path / "base", seed=2)
    base = type(base).from_pretrained(tmp_path / "base")
    names = [name for name, _ in base.named_parameters()]
    guide = GenARMLogitsProcessor(base, tmp_path / "adapter")
    arm = guide.members[1].model
    assert arm.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert [name for name, _ in base.named_parameters()] == names
    run = {"temperature": 0.0, "max_new_tokens": 12, "stop_token_ids": [1]}
    expected = reference.generate(base, [merged], [PROMPTS[0]] * 2, [1.0], **run).tokens
    assert generate(base, guide, PROMPTS[:1]) == [expected]


def test_refusals(guide, base, tiny_model, padded_tokenizer):
    ids, scores = torch.tensor([[5, 6]]), torch.zeros(1, 300)
    for wrong in ((ids[:, :0], scores), (ids, scores[:, :299]), (ids.repeat(2, 1), scores)):
        with pytest.raises(ValueError, match=r"input_ids of shape .* expected"):
            guide(*wrong)
    with pytest.raises(ValueError, match="every row begins with pad_token_id=2"):
        guide(torch.tensor([[PAD, 5], [PAD, 6]]), scores.repeat(2, 1))
    short = GenARMLogitsProcessor(
        base, tiny_model(seed=1, max_position_embeddings=6), weights=1, tokenizer=padded_tokenizer
    )
    with pytest.raises(ValueError, match="input_ids: 7 tokens for arm: expected at most 6, its context"):
        generate(base, short, PROMPTS)
    with pytest.raises(TypeError, match="base='folder': expected the loaded model"):
        GenARMLogitsProcessor("folder", [])
    with pytest.raises(ValueError, match=r"weights=\[1\]: expected 2 numbers"):
        GenARMLogitsProcessor(base, [tiny_model(seed=1)] * 2, weights=[1], tokenizer=padded_tokenizer)
    with pytest.raises(ValueError, match="pad_token_id=-1"):
        GenARMLogitsProcessor(base, [], pad_token_id=-1, tokenizer=padded_tokenizer)


def test_importing_the_package_imports_nothing_heavy():
    code = "import genarm_fast.integrations, sys; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
