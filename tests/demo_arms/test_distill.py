"""Distillation: agreement with the base, learning rates, widths, and runs that are killed."""

import json
import sys
from pathlib import Path

import agreement
import distill
import numpy as np
import pytest
import teacher_data
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from genarm_fast import demo


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
    for name, value in {"LAYERS": 1, "BATCH": 4, "WARMUP": 20, "CHECKPOINT_S": -1}.items():
        monkeypatch.setattr(distill, name, value)

    def run(output: str) -> dict[str, torch.Tensor]:
        shards = str(tmp_path / "shards")
        options = ["--held-out", shards, "--base", str(tmp_path / "base"), "--tokens", "500", "--dropout", "0"]
        options += ["--hidden", "32"]
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
    saved = torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)
    saved["model"]["model.embed_tokens.weight"] = torch.zeros(300, 64)
    torch.save(saved, tmp_path / "killed/checkpoint.pt")
    with pytest.raises(SystemExit, match=r"--hidden 32: expected 64, the width of .*checkpoint\.pt"):
        run("killed")


def test_a_student_of_each_width():
    """Widths, heads and parameters are worked out by hand. The embedding keeps the part of the base's largest singular
    vectors."""
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=96, num_hidden_layers=1, num_attention_heads=3))
    table = base.get_input_embeddings().weight.detach()
    values = torch.linalg.svdvals(table)
    for hidden, inner in ((32, 96), (64, 192), (96, 256)):
        student = distill.new_student(base, hidden)
        assert student.config.intermediate_size == inner
        assert student.config.num_attention_heads == student.config.num_key_value_heads == hidden // 32
        layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
        assert student.num_parameters() == 96 * hidden + distill.LAYERS * layer + hidden
        kept = student.get_input_embeddings().weight.detach()
        torch.testing.assert_close(torch.linalg.svdvals(kept), values[:hidden], rtol=1e-3, atol=1e-3)
    for wrong in (0, -32, 48, 128):
        with pytest.raises(
            ValueError, match=f"hidden={wrong}: expected a multiple of 32, at most the base's width of 96"
        ):
            distill.new_student(base, wrong)


def test_the_shipped_shape():
    """The shipped `small` has the shape of hidden=160."""
    shipped = AutoConfig.from_pretrained(demo.arm("small"))
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=192, num_hidden_layers=1, num_attention_heads=3))
    config = distill.new_student(base).config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(config, name) == getattr(shipped, name), name
