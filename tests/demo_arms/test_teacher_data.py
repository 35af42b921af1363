"""Teacher samples: stored probabilities are the model's, whatever the padding; draws follow the distribution."""

import copy
from pathlib import Path

import numpy as np
import pytest
import teacher_data
import torch
from agreement import load_responses, response_logprobs

EOS = 1


@pytest.fixture
def model(tiny_model):
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    model.set_attn_implementation("grouped")
    yield model
    model.set_attn_implementation(implementation)


@pytest.mark.parametrize(
    "prompts",
    [
        [[5, 6, 7, 8, 9], [5, 6, 20], [5, 6, 7, 30, 31, 32, 33]],
        [[5, 6, 7], [5, 6, 7]],
        [[40, 41], [50, 51, 52]],
    ],
    ids=["shared opening", "equal prompts", "nothing shared"],
)
def test_stored_logprobs_equal_a_plain_forward(model, tmp_path: Path, prompts):
    rows = teacher_data.sample_responses(
        model, prompts, [1.0, 0.5, 0.8][: len(prompts)], 12, EOS, torch.Generator().manual_seed(3)
    )
    columns = {"prompt_index": np.arange(len(prompts)), "temperature": np.ones(len(prompts), np.float32)}
    teacher_data.write_shard(tmp_path / "00000.npz", prompts, rows, EOS, **columns)
    model.set_attn_implementation("eager")
    for prompt, response in zip(prompts, load_responses(tmp_path)):
        assert response["prompt_tokens"].tolist() == prompt
        expected, ids = response_logprobs(model, response).topk(teacher_data.TOP)
        np.testing.assert_array_equal(ids[:, :8], response["top_ids"][:, :8].astype(int))
        np.testing.assert_allclose(expected, response["top_logprobs"].astype(np.float32), atol=5e-3)
        for top, tail in zip(response["top_ids"], response["tail_ids"]):
            assert not set(top.tolist()) & set(tail.tolist())


def test_responses_end_at_eos(model):
    rows = teacher_data.sample_responses(model, [[5, 6]] * 64, [1.0] * 64, 40, EOS, torch.Generator().manual_seed(0))
    ended = [r["tokens"] for r in rows if EOS in r["tokens"]]
    assert ended  # about one text in eight ends, at 300 tokens
    assert all((tokens[:-1] != EOS).all() for tokens in ended)
    assert all(len(r["tokens"]) == 40 for r in rows if EOS not in r["tokens"])


@pytest.mark.parametrize(("tilt", "same"), [(0.0, True), (0.1, False)], ids=["same", "control"])
def test_draws_follow_the_probabilities(tilt: float, same: bool):
    probs = torch.tensor([[0.0, 1.0, 2.0, 0.0, 5.0, 2.0]])
    n = 20_000
    counts = torch.bincount(teacher_data.draw(probs, n, torch.Generator().manual_seed(1))[0], minlength=6)
    expected = probs[0] / probs.sum()
    expected = expected + tilt * torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0])
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum().item()
    assert (chi2 < 16.3) == same  # 3 degrees of freedom, p = 0.001


def test_a_plan_answers_each_prompt_and_alternates():
    shards = teacher_data.plan([str(i) for i in range(100)], batch_size=16, samples=4)
    assert sorted({i for shard in shards for i in shard}) == list(range(100))
    assert shards[0] == [i for i in range(4) for _ in range(4)]
    assert shards[1] == list(range(4, 20))


def test_the_prefix_leaves_a_token_of_every_prompt():
    assert teacher_data.shared_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert teacher_data.shared_prefix([[1, 2], [1, 2]]) == 1
    assert teacher_data.shared_prefix([[1], [1, 2]]) == 0


def test_a_base_in_bfloat16_is_normalised_in_float32(model):
    """Probabilities keep float16's precision, which bfloat16's steps of 1/256 would lose."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    (row,) = teacher_data.sample_responses(half, [[5, 6, 7]], [1.0], 8, EOS, torch.Generator().manual_seed(0))
    kept = torch.from_numpy(row["top_logprobs"]).float()
    assert (kept != kept.bfloat16().float()).float().mean() > 0.5
    expected = response_logprobs(half, row | {"prompt_tokens": np.array([5, 6, 7])}).topk(teacher_data.TOP).values
    np.testing.assert_allclose(kept, expected, atol=0.1)
