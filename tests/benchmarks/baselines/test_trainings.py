"""Trainings through TRL, on tiny models: the intended losses, and adapters that load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

GOOD, BAD = "the cat sat on the mat", "a man and the sea"
FEW: dict[str, Any] = {"learning_rate": 2e-2, "gradient_accumulation_steps": 1, "disable_tqdm": True}


@pytest.fixture
def base(tmp_path: Path, tiny_model, tokenizer) -> Path:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(tmp_path: Path, count: int = 8) -> list[Any]:
    from baselines.pairs import split

    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": GOOD[: 22 - i], "rejected": BAD[: 17 - i]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, held_out = split(path, 4)
    assert [pair.row for pair in held_out] == [0, 4]
    return training


def logprob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(response)[:, None]).sum()


def test_loss_of_dpo(base: Path, tmp_path: Path) -> None:
    """TRL's loss of a perturbed policy equals the formula, computed by whole forwards."""
    from baselines.dpo import trainer_of

    training, tokenizer = pairs(tmp_path)[:2], AutoTokenizer.from_pretrained(base)
    trainer = trainer_of(base, training, tmp_path / "out", beta=0.3, micro_batch=2, epochs=1.0, **FEW)
    model = trainer.model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(model.eval(), batch).item()
        margins = []  # chosen responses first, then rejected ones
        for ids, kept, completed in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
            tokens, start = ids[kept.bool()].tolist(), int(completed.argmax())
            text = tokenizer.decode(tokens[start:]).strip()
            assert text in {side + tokenizer.eos_token for pair in training for side in (pair.chosen, pair.rejected)}
            ours = logprob(model, tokens[:start], tokens[start:])
            with model.disable_adapter():
                margins.append(ours - logprob(model, tokens[:start], tokens[start:]))
        chosen, rejected = margins[:2], margins[2:]
        wanted = [-torch.nn.functional.logsigmoid(0.3 * (good - bad)).item() for good, bad in zip(chosen, rejected)]
    assert loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert abs(loss - 0.6931) > 1e-2, "the perturbation should matter"


def test_dpo_raises_the_chosen_over_the_rejected(base: Path, tmp_path: Path) -> None:
    from baselines.dpo import train
    from peft import PeftModel

    from genarm_fast import GenARM

    trainer = train(base, pairs(tmp_path), tmp_path / "out", beta=0.1, micro_batch=2, epochs=4.0, **FEW)
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[-1] > margins[0] + 0.1
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    prompt, good = [10, 11], [12, 13]
    with torch.inference_mode(), policy.disable_adapter():
        before = logprob(policy, prompt, good)
    assert logprob(policy, prompt, good) != before
    assert GenARM.from_pretrained(tmp_path / "out").generate([[2, 3]], max_new_tokens=2, seed=1)


def test_rankings_are_those_of_whole_forwards(base: Path, tmp_path: Path) -> None:
    """Accuracies of a moved policy equal those of one unpadded forward per text, with and without the adapter."""
    from baselines.dpo import trainer_of
    from baselines.likelihoods import encoded, rankings

    tokenizer, chosen = AutoTokenizer.from_pretrained(base), pairs(tmp_path)
    trainer = trainer_of(base, chosen, tmp_path / "out", beta=0.1, micro_batch=2, epochs=1.0, **FEW)
    policy = trainer.model.eval()
    torch.manual_seed(3)
    prompts, responses = encoded(tokenizer, chosen)
    assert {row[-1] for row in responses} == {tokenizer.eos_token_id}
    with torch.inference_mode():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        ours = torch.stack([logprob(policy, *each) for each in zip(prompts, responses)]).view(-1, 2)
        with policy.disable_adapter():
            bases = torch.stack([logprob(policy, *each) for each in zip(prompts, responses)]).view(-1, 2)
    found = rankings(policy, tokenizer, chosen)
    for name, values in {"policy": ours, "base": bases, "policy over base": ours - bases}.items():
        assert found[name]["accuracy"] == pytest.approx((values[:, 0] > values[:, 1]).double().mean().item())
    shorter = [len(good) < len(bad) for good, bad in zip(responses[::2], responses[1::2])]
    assert found["shorter"]["accuracy"] == sum(shorter) / len(shorter)
    assert len({each["accuracy"] for each in found.values()}) > 1, "the policy should differ from its base"


def test_share_of_right_pairs() -> None:
    from baselines.likelihoods import share_right

    found = share_right(torch.tensor([2.0, -1.0, 0.0, 3.0]))
    assert found == {"accuracy": 0.625, "standard_error": (0.625 * 0.375 / 4) ** 0.5, "mean_margin": 1.0}


def test_trajectory_reward(base: Path, tmp_path: Path) -> None:
    from baselines.trajectory_reward import TrajectoryReward, accuracy, train

    training, tokenizer = pairs(tmp_path), AutoTokenizer.from_pretrained(base)
    model = train(base, training, tmp_path / "out", layers=1, micro_batch=2, epochs=6.0, **FEW)
    assert accuracy(model, tokenizer, training)[0] == 1.0
    untrained = TrajectoryReward(model_of(base))
    assert accuracy(untrained, tokenizer, training)[0] < 1.0
    again = TrajectoryReward.from_pretrained(base, tmp_path / "out")
    assert len(again.decoder.layers) == 1
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    torch.testing.assert_close(again(rows, batch=2), model(rows))
    torch.testing.assert_close(again(rows, batch=1), again(rows, batch=3))  # padding changes nothing


def model_of(base: Path) -> Any:
    from baselines.trajectory_reward import classifier_of

    with pytest.raises(ValueError, match="layers=3: expected 1 to 2"):
        classifier_of(base, 3)
    return classifier_of(base, 1).eval()


def test_rewarded_fine_tune(base: Path, tmp_path: Path) -> None:
    """The reward gets prompt and completion, and the training changes the adapter."""
    from baselines.rewarded import train
    from safetensors.torch import load_file

    tokenizer, asked = AutoTokenizer.from_pretrained(base), []

    def reward(rows: list[list[int]]) -> torch.Tensor:
        asked.extend(rows)
        return torch.tensor([float(sum(token % 2 for token in row[3:])) for row in rows])

    prompts = [tokenizer.decode([40, 41, 42 + i]) for i in range(2)]
    train(base, prompts, reward, tmp_path / "out", group=2, max_new_tokens=4, **FEW)
    starts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert asked
    assert all(any(row[: len(start)] == start for start in starts) for row in asked)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
