"""Distillation: the sparse loss against brute force, the tail estimate's mean, the student's first embedding."""

import copy
import json
import math
import sys
from pathlib import Path

import agreement
import distill
import numpy as np
import pytest
import teacher_data
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@pytest.fixture
def response() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n = 5
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(200), n)))[:, ::-1]
    ids = np.stack([rng.permutation(300)[:56] for _ in range(n)]).astype(np.uint16)
    return {
        "prompt_tokens": np.array([3, 4, 5], np.uint16),
        "tokens": rng.integers(0, 300, n).astype(np.uint16),
        "top_ids": ids[:, :48],
        "top_logprobs": logprobs[:, :48].astype(np.float16),
        "tail_ids": ids[:, 48:],
    }


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_sparse_cross_entropy_equals_brute_force(chunk: int):
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, dtype=torch.float64)
    ids, probs = torch.randint(0, 50, (37, 6)), torch.rand(37, 6, dtype=torch.float64)  # ids repeat
    probs /= probs.sum(-1, keepdim=True)
    loss = 2 * distill.SparseCrossEntropy.apply(hidden, weight, bias, ids, probs, chunk)
    expected = -2 * ((hidden @ weight.T + bias).log_softmax(-1).gather(1, ids) * probs).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected))):
        torch.testing.assert_close(got, wanted)


def test_candidates_estimate_the_normaliser_without_bias():
    torch.manual_seed(0)
    logits, ids = torch.randn(400) / 2, torch.arange(0, 400, 40)[None]
    estimates = []
    for _ in range(500):
        kept, bias = distill.candidates(ids, 400, negatives=30)
        assert set(ids[0].tolist()) <= set(kept.tolist())
        assert len(kept) == 40
        assert (kept.diff() > 0).all()
        estimates.append((logits[kept] + bias).exp().sum().item())
    mean, error = np.mean(estimates), np.std(estimates) / 500**0.5
    exact = logits.exp().sum().item()
    assert abs(mean - exact) < 4 * error < 0.05 * exact
    kept, bias = distill.candidates(ids, 400, negatives=390)
    assert len(kept) == 400
    assert not bias.any()


def test_targets_sum_to_one_and_share_the_tail(response):
    ids, probs = distill.sparse_targets(response)
    torch.testing.assert_close(probs.sum(-1), torch.ones(5))
    torch.testing.assert_close(probs[:, 48:], probs[:, 48:49].expand(-1, 8))
    assert probs[:, 48:].sum(-1).min() > 0.05
    np.testing.assert_array_equal(ids, np.concatenate([response["top_ids"], response["tail_ids"]], -1).astype(int))


def test_batch_loss_reads_the_right_positions(tiny_model, response):
    """Against one unbatched, unpadded forward per response with a dense log-softmax."""
    model = tiny_model("llama")
    short = {key: value[:2] for key, value in response.items()}
    loss, n = distill.batch_loss(model, [response, short])
    assert n == 7
    expected = []
    for r in (response, short):
        ids, probs = distill.sparse_targets(r)
        expected.append(-(agreement.response_logprobs(model, r).gather(1, ids) * probs).sum(-1))
    torch.testing.assert_close(loss, torch.cat(expected).mean(), rtol=1e-4, atol=1e-4)


def test_a_free_token_may_have_any_probability(tiny_model, response):
    """The loss of dense distributions without it; its own logit gets no gradient."""
    model = tiny_model("llama")
    ids, probs = distill.sparse_targets(response)
    free = int(ids[0, 0])
    loss, _ = distill.batch_loss(model, [response], free)
    logprobs = agreement.response_logprobs(model, response).index_fill(1, torch.tensor([free]), -math.inf)
    targets = torch.zeros_like(logprobs).scatter_add_(1, ids, probs).index_fill_(1, torch.tensor([free]), 0.0)
    targets /= targets.sum(-1, keepdim=True)
    expected = -(targets * logprobs.log_softmax(-1).masked_fill(targets == 0, 0.0)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(loss, distill.batch_loss(model, [response])[0], rtol=1e-3)


def test_distillation_draws_by_number_and_looks_through_an_adapter(tiny_model, response, monkeypatch):
    responses = [{key: value[: n + 1] for key, value in response.items()} for n in range(5)]
    monkeypatch.setattr(distill, "load_responses", lambda folder: responses)
    model = tiny_model("llama")
    near_base = distill.Distillation(Path("shards"), count=2, weight=0.5)
    losses = [near_base(model, number).item() for number in (0, 1, 2)]
    assert len(set(losses)) > 1
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert [near_base(adapted, number).item() for number in (0, 1, 2)] == pytest.approx(losses)
    near_base(adapted, 0).backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


def test_agreement_against_itself_and_another(tiny_model, response):
    base, other = tiny_model("llama"), tiny_model("llama", seed=1)
    measure = agreement.Agreement(base, [response])
    same, different = measure.plain(base), measure.plain(other)
    assert same["kl"] == pytest.approx(0, abs=1e-3)
    assert same["top1"] == 1
    assert same["overlap"] == pytest.approx(1, abs=1e-3)
    assert different["kl"] > 0.01
    assert different["overlap"] < 0.99
    assert measure.drift(base, other) > 0.01 > abs(measure.drift(base, base))
    guided = measure.guided(base)  # an ARM equal to the base: tempering predicts the guided distribution exactly
    assert all((value == pytest.approx(1, abs=1e-3)) == ("untempered" not in name) for name, value in guided.items())


def test_overlap_is_the_mass_in_common():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    torch.testing.assert_close(agreement.overlap(p, q), torch.tensor([0.7]))


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [distill.learning_rate(tokens, 1e6) for tokens in (0, distill.WARMUP / 2, 3e5, 7.5e5, 1e6, 1.1e6)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_a_killed_run_ends_like_an_unbroken_one(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.generation_config.save_pretrained(tmp_path / "base")
    prompts = [[5 + i, 6, 7] for i in range(12)]
    rows = teacher_data.sample_responses(base, prompts, [1.0] * 12, 6, 1, torch.Generator().manual_seed(0))
    (tmp_path / "shards").mkdir()
    columns = {"prompt_index": np.arange(12), "temperature": np.ones(12, np.float32)}
    teacher_data.write_shard(tmp_path / "shards/00000.npz", prompts, rows, 1, **columns)
    for name, value in {
        "HIDDEN": 16,
        "LAYERS": 1,
        "INTERMEDIATE": 24,
        "HEADS": 2,
        "BATCH": 4,
        "WARMUP": 20,
        "CHECKPOINT_S": -1,
    }.items():
        monkeypatch.setattr(distill, name, value)

    def run(output: str) -> dict[str, torch.Tensor]:
        shards = str(tmp_path / "shards")
        options = ["--held-out", shards, "--base", str(tmp_path / "base"), "--tokens", "500", "--dropout", "0"]
        monkeypatch.setattr(
            sys, "argv", ["distill.py", shards, str(tmp_path / output), *options, "--eval-every", "200"]
        )
        distill.main()
        return AutoModelForCausalLM.from_pretrained(tmp_path / output / "model").state_dict()

    unbroken = run("unbroken")
    batch_loss, calls = distill.batch_loss, []

    def dies_between_and_at_the_end_of_epochs(*args):
        calls.append(1)
        if len(calls) in (5, 11):
            raise KeyboardInterrupt
        return batch_loss(*args)

    monkeypatch.setattr(distill, "batch_loss", dies_between_and_at_the_end_of_epochs)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    killed = run("killed")
    for name, weight in unbroken.items():
        torch.testing.assert_close(killed[name], weight, msg=name)
    histories = [json.loads((tmp_path / o / "report.json").read_text())["history"] for o in ("unbroken", "killed")]
    assert [h["kl"] for h in histories[0]] == pytest.approx([h["kl"] for h in histories[1]])
    assert len(histories[0]) == 3
    assert histories[0][-1]["kl"] < histories[0][0]["kl"]
