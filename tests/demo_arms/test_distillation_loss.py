"""The loss of distillation: the sparse loss against brute force, the normaliser's mean, tokens of free probability."""

import copy
import math
from pathlib import Path

import agreement
import distillation_loss
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_sparse_cross_entropy_equals_brute_force(chunk: int):
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, dtype=torch.float64)
    ids, probs = torch.randint(0, 50, (37, 6)), torch.rand(37, 6, dtype=torch.float64)  # ids repeat
    probs /= probs.sum(-1, keepdim=True)
    loss = 2 * distillation_loss.SparseCrossEntropy.apply(hidden, weight, bias, ids, probs, chunk)
    expected = -2 * ((hidden @ weight.T + bias).log_softmax(-1).gather(1, ids) * probs).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected))):
        torch.testing.assert_close(got, wanted)


def test_candidates_estimate_the_normaliser_without_bias():
    torch.manual_seed(0)
    logits, ids = torch.randn(400) / 2, torch.arange(0, 400, 40)[None]
    estimates = []
    for _ in range(500):
        kept, bias = distillation_loss.candidates(ids, 400, negatives=30)
        assert set(ids[0].tolist()) <= set(kept.tolist())
        assert len(kept) == 40
        assert (kept.diff() > 0).all()
        estimates.append((logits[kept] + bias).exp().sum().item())
    mean, error = np.mean(estimates), np.std(estimates) / 500**0.5
    exact = logits.exp().sum().item()
    assert abs(mean - exact) < 4 * error < 0.05 * exact
    kept, bias = distillation_loss.candidates(ids, 400, negatives=390)
    assert len(kept) == 400
    assert not bias.any()


def test_targets_sum_to_one_and_share_the_tail(response):
    ids, probs = distillation_loss.sparse_targets(response)
    torch.testing.assert_close(probs.sum(-1), torch.ones(5))
    torch.testing.assert_close(probs[:, 48:], probs[:, 48:49].expand(-1, 8))
    assert probs[:, 48:].sum(-1).min() > 0.05
    np.testing.assert_array_equal(ids, np.concatenate([response["top_ids"], response["tail_ids"]], -1).astype(int))


def test_batch_loss_reads_the_right_positions(tiny_model, response):
    """The loss equals one unbatched, unpadded forward per response with a dense log-softmax."""
    model = tiny_model("llama")
    short = {key: value[:2] for key, value in response.items()}
    loss, n = distillation_loss.batch_loss(model, [response, short])
    assert n == 7
    expected = []
    for r in (response, short):
        ids, probs = distillation_loss.sparse_targets(r)
        expected.append(-(agreement.response_logprobs(model, r).gather(1, ids) * probs).sum(-1))
    torch.testing.assert_close(loss, torch.cat(expected).mean(), rtol=1e-4, atol=1e-4)


def test_a_free_token_may_have_any_probability(tiny_model, response):
    """The loss equals that of dense distributions without the token, whose own logit gets no gradient."""
    model = tiny_model("llama")
    ids, probs = distillation_loss.sparse_targets(response)
    free = int(ids[0, 0])
    loss, _ = distillation_loss.batch_loss(model, [response], free)
    logprobs = agreement.response_logprobs(model, response).index_fill(1, torch.tensor([free]), -math.inf)
    targets = torch.zeros_like(logprobs).scatter_add_(1, ids, probs).index_fill_(1, torch.tensor([free]), 0.0)
    targets /= targets.sum(-1, keepdim=True)
    expected = -(targets * logprobs.log_softmax(-1).masked_fill(targets == 0, 0.0)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(loss, distillation_loss.batch_loss(model, [response])[0], rtol=1e-3)


def test_distillation_draws_by_number_and_looks_through_an_adapter(tiny_model, response, monkeypatch):
    responses = [{key: value[: n + 1] for key, value in response.items()} for n in range(5)]
    monkeypatch.setattr(distillation_loss, "load_responses", lambda folder: responses)
    model = tiny_model("llama")
    near_base = distillation_loss.Distillation(Path("shards"), count=2, weight=0.5)
    losses = [near_base(model, number).item() for number in (0, 1, 2)]
    assert len(set(losses)) > 1
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert [near_base(adapted, number).item() for number in (0, 1, 2)] == pytest.approx(losses)
    near_base(adapted, 0).backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)
