"""The members of the logits processor: templates, vocabularies, masks, shared weights, refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from guided_rows import PAD, PROMPTS, Checked, generate
from tiny_models import build_model, build_tokenizer, save_adapter

from genarm_fast import ARM, GenARM, reference
from genarm_fast.integrations.transformers import GenARMLogitsProcessor


@pytest.mark.parametrize("prompts", [["the cat", "there is no place", "a"], [[{"role": "user", "content": "hi"}]] * 2])
def test_arms_with_templates_of_their_own(prompts, base, tiny_model, padded_tokenizer):
    """Each ARM's prompts are padded in their own way."""
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
    """Only common tokens are drawn. Rows that have ended may be filled with a pad token that an ARM has no embedding
    of."""
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
    """A mask by the base or an ARM that runs stays, whatever the sign of the ARM's weight."""

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
