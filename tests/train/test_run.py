"""Whole runs on a tiny model: they learn the preferences in the data, and leave the files that loading needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_pairs import toy_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from genarm_fast import GenARM
from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.train import TrainConfig, train
from genarm_fast.train.artifacts import curve
from genarm_fast.train.checks import stop_ids
from genarm_fast.train.data import load_pairs, split_pairs
from genarm_fast.train.model import default_targets

Config = Callable[..., TrainConfig]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "curve.png", "genarm.json", "report.json"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_learns_a_preference(make_config: Config, write_jsonl: Callable[..., Path], method: str) -> None:
    """Held-out accuracy rises from a random model's to nearly 1."""
    options = {"epochs": 4, "method": method, "learning_rate": 0.02 if method == "lora" else 0.005}
    result = train(make_config(write_jsonl(toy_rows(96)), **options), progress=False)
    assert result.report["before"]["accuracy"] < 0.8
    assert result.accuracy is not None
    assert result.accuracy > 0.95
    assert result.report["final"]["margin_mean"] > result.report["before"]["margin_mean"] + 5
    assert result.report["final"]["loss"] < result.report["before"]["loss"]


def test_an_auxiliary_loss_counts_once_a_step(make_config: Config, toy: Path, tmp_path: Path) -> None:
    """The auxiliary loss has the same effect for any micro-batch size, and is not ignored."""

    def trained(micro_batch_size: int, weight: float) -> dict[str, torch.Tensor]:
        def shrink(lm: torch.nn.Module, number: int) -> torch.Tensor:
            return weight * sum(p.square().sum() for name, p in lm.named_parameters() if "lora_A" in name)

        name = str(tmp_path / f"{micro_batch_size}-{weight}")
        plain = {"optimizer": "sgd", "max_grad_norm": 1e9, "lora_dropout": 0.0}  # Adam would hide wrong factors
        options = {"micro_batch_size": micro_batch_size, "batch_size": 36, "epochs": 4, **plain}
        result = train(
            make_config(toy, **options, save_dtype="float32", output=name), progress=False, auxiliary_loss=shrink
        )
        return load_file(result.folder / "adapter_model.safetensors")

    one, other, free = trained(4, 1.0), trained(36, 1.0), trained(36, 0.0)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)
        assert "lora_A" not in name or value.norm() < 0.97 * free[name].norm()


def test_learns_nothing_from_shuffled_labels(make_config: Config, write_jsonl: Callable[..., Path]) -> None:
    """This is the negative control: the same responses, with chosen and rejected swapped at random."""
    config = make_config(write_jsonl(toy_rows(192, shuffled=True)), epochs=2, learning_rate=0.02, holdout_every=2)
    result = train(config, progress=False)
    assert result.accuracy is not None
    assert result.report["final"]["pairs"] == 96
    assert 0.3 < result.accuracy < 0.7


def test_leaves_everything_that_loading_needs(make_config: Config, toy: Path, base: Path) -> None:
    names = {"base_id": "org/tiny", "data_id": "toy pairs"}
    config = make_config(toy, **names, beta=0.1, prompt_template="Q {prompt}", eval_every=3)
    result = train(config, progress=False)
    assert {path.name for path in result.folder.iterdir()} == FILES | {"run.json"}
    info = json.loads((result.folder / "genarm.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(base)
    assert (info["base"], info["base_fingerprint"]) == ("org/tiny", fingerprint(lm))
    assert (info["beta"], info["data"], info["prompt_template"]) == (0.1, "toy pairs", "Q {prompt}")
    assert info["metrics"]["accuracy"] == result.accuracy
    assert json.loads((result.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    card = (result.folder / "README.md").read_text()
    for text in ("base_model: org/tiny", info["base_fingerprint"], "| β_r | 0.1 |", "toy pairs", "Q {prompt}"):
        assert text in card
    assert (result.folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((result.folder / "report.json").read_text())
    assert report == result.report
    for file in ("report.json", "genarm.json", "adapter_config.json", "README.md"):
        assert str(base.parent) not in (result.folder / file).read_text()
    steps = [entry["step"] for entry in report["history"] if "eval_accuracy" in entry]
    assert steps == [0, 3, 5]
    assert report["data"]["held_out_rows"] == list(range(0, 48, 4))
    assert load_file(result.folder / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_curve() -> None:
    """Three panels show training and held-out values at their steps; held-out values start before the first step."""
    history = [
        {"step": 0, "eval_loss": 0.7, "eval_accuracy": 0.5, "eval_margin_mean": 0.0},
        {"step": 1, "loss": 0.6, "train_accuracy": 0.6, "train_margin_mean": 1.0},
        {"step": 2, "loss": 0.5, "train_accuracy": 0.7, "train_margin_mean": 2.0},
        {"step": 2, "eval_loss": 0.4, "eval_accuracy": 0.8, "eval_margin_mean": 3.0},
    ]
    figure = curve(history, "toy")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert (lines["training"].get_xydata().tolist(), lines["held out"].get_xydata().tolist()) == (  # type: ignore[union-attr]
        [[1, 0.6], [2, 0.5]],
        [[0, 0.7], [2, 0.4]],
    )
    assert [axis.get_title() for axis in figure.axes] == ["loss", "pair accuracy", "reward margin (nats)"]
    assert all(len(axis.lines) >= 2 for axis in figure.axes)


@pytest.fixture
def arm(make_config: Config, toy: Path) -> Path:
    return train(make_config(toy, save_dtype="float32", as_chat=True, learning_rate=0.02), progress=False).folder


def test_guiding_sees_the_rewards_of_training(arm: Path, base: Path, toy: Path, make_config: Config) -> None:
    """Decoding uses the template, EOS and weights of training: its scores of the held-out pairs equal the report's."""
    model = GenARM.from_pretrained(str(base), [str(arm)], dtype=torch.float32)
    held_out = split_pairs(load_pairs(str(toy)).pairs, make_config(toy))[1]
    prompts = [[{"role": "user", "content": str(pair.prompt)}] for pair in held_out]
    tokenizer = AutoTokenizer.from_pretrained(base)
    final = json.loads((arm / "report.json").read_text())["final"]
    for side in ("chosen", "rejected"):
        responses = [[*tokenizer(getattr(pair, side))["input_ids"], tokenizer.eos_token_id] for pair in held_out]
        totals = [next(iter(output.rewards.values())).total for output in model.score(prompts, responses)]
        assert sum(totals) / len(totals) == pytest.approx(final[f"reward_{side}"], rel=1e-4)


def test_wrong_base_is_refused(
    arm: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    other = tmp_path / "other"
    tiny_model(hidden_size=16, max_position_embeddings=256, seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    config = json.loads((arm / "adapter_config.json").read_text())
    (arm / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    with pytest.raises(ValueError, match="fingerprint"):
        GenARM.from_pretrained(str(other), [str(arm)], dtype=torch.float32)


def test_full_fine_tuning_leaves_a_model_of_its_own(make_config: Config, toy: Path, base: Path) -> None:
    result = train(make_config(toy, method="full", learning_rate=0.001, save_dtype="float32"), progress=False)
    info = json.loads((result.folder / "genarm.json").read_text())
    assert info["base_fingerprint"] is None
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert fingerprint(model) != fingerprint(AutoModelForCausalLM.from_pretrained(base))
    assert len(AutoTokenizer.from_pretrained(result.folder)) == 300


def test_nothing_held_out(make_config: Config, toy: Path) -> None:
    result = train(make_config(toy, holdout_every=None, holdout_fraction=0.0, eval_every=2), progress=False)
    assert result.accuracy is None
    assert result.report["final"] == {}
    assert result.report["data"]["train_pairs"] == 48


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"attn_implementation": "eager"}])
def test_options_of_speed_alone(make_config: Config, toy: Path, tmp_path: Path, option: dict[str, object]) -> None:
    plain = train(make_config(toy, output=str(tmp_path / "plain"), lora_dropout=0.0), progress=False)
    other = train(make_config(toy, output=str(tmp_path / "other"), lora_dropout=0.0, **option), progress=False)
    for name in ("loss", "reward_chosen", "reward_rejected"):
        assert other.report["final"][name] == pytest.approx(plain.report["final"][name], rel=1e-3)


def test_a_sample_of_the_pairs(make_config: Config, toy: Path) -> None:
    report = train(make_config(toy, max_pairs=10), progress=False).report
    assert (report["data"]["train_pairs"], report["data"]["held_out_pairs"], report["steps"]) == (10, 12, 2)


def test_the_only_step_of_a_run_learns(make_config: Config, toy: Path) -> None:
    """The step would be all warmup, at a learning rate of 0."""
    report = train(make_config(toy, max_pairs=8), progress=False).report
    assert report["steps"] == 1
    assert report["final"]["loss"] < report["before"]["loss"]


def test_accumulation_is_exact(make_config: Config, toy: Path, tmp_path: Path) -> None:
    """One step on 36 pairs is the same in micro-batches of 8, the last of them short, and of 1."""
    weights = []
    for micro in (8, 1):
        options = {
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "warmup": 0.0,
            "lora_dropout": 0.0,
            "save_dtype": "float32",
        }
        config = make_config(toy, micro_batch_size=micro, batch_size=40, output=str(tmp_path / str(micro)), **options)
        assert train(config, progress=False).report["steps"] == 1
        weights.append(load_file(tmp_path / str(micro) / "adapter_model.safetensors"))
    assert any(value.any() for name, value in weights[0].items() if "lora_B" in name)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_targets": ("q_proj", "c_attn")}, "no linear module 'c_attn': expected some of down_proj, .*q_proj"),
        ({"max_response_tokens": 2}, "expected training pairs, all of 48 rows are dropped .*response too long"),
        ({"optimizer": "adamm"}, "optimizer='adamm': expected one of .*adamw_torch"),
        ({"optimizer": "lomo"}, "optimizer='lomo': expected one that can be used here: .*lomo"),
        ({"prompt_template": "{prompt}" + "x" * 300}, "a pair has .* tokens, the base's context 256"),
    ],
)
def test_errors_before_training(make_config: Config, toy: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_config(toy, **options), progress=False)
    assert not make_config(toy).folder.exists()
    train(make_config(toy), progress=False)  # the folder is still free


def test_an_arm_of_another_rounding_says_so(make_config: Config, toy: Path, base: Path) -> None:
    """A float32 base rounded to float16 has other weights. The ARM has to be served in its training dtype."""
    folder = train(make_config(toy, dtype="float16"), progress=False).folder
    with pytest.raises(ValueError, match=r"trained in float16, this is float32: try dtype='float16'"):
        GenARM.from_pretrained(base, folder)
    assert GenARM.from_pretrained(base, folder, dtype="float16").arms[0].model.dtype == torch.float16


@pytest.mark.parametrize("way", ["none", "all"])
def test_report_to_as_transformers_takes_it(make_config: Config, toy: Path, way: str) -> None:
    assert train(make_config(toy, report_to=(way,)), progress=False).report["steps"] > 0


def test_all_pairs_held_out(make_config: Config, toy: Path) -> None:
    with pytest.raises(ValueError, match=r"all of 48 rows are dropped \(\{\}\) or held out \(48\)"):
        train(make_config(toy, holdout_every=None, holdout_fraction=0.999), progress=False)


def test_a_diverging_run_stops(make_config: Config, toy: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+: expected a finite number"):
        train(make_config(toy, learning_rate=1e30, max_grad_norm=0.0, warmup=0.0, epochs=3), progress=False)


def test_a_run_that_diverges_unseen_leaves_no_arm(make_config: Config, toy: Path) -> None:
    """The run logs only the first step's loss."""
    config = make_config(toy, learning_rate=1e30, max_grad_norm=0.0, warmup=0.0, epochs=3, log_every=1000)
    with pytest.raises(FloatingPointError, match=r"a trained weight is not finite at step \d+: expected"):
        train(config, progress=False)
    assert not (config.folder / "report.json").exists()


def test_a_tokenizer_with_more_tokens_than_the_base(
    make_config: Config, toy: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], base: Path
) -> None:
    narrow = tmp_path / "narrow"
    tiny_model(hidden_size=16, vocab_size=290).save_pretrained(narrow)
    AutoTokenizer.from_pretrained(base).save_pretrained(narrow)
    config = dataclasses.replace(make_config(toy), base=str(narrow))
    with pytest.raises(ValueError, match=r"base='.*narrow': its tokenizer gives token 29\d, expected less than 290"):
        train(config, progress=False)


def test_an_adapter_is_no_base(make_config: Config, toy: Path, arm: Path, base: Path, tmp_path: Path) -> None:
    """Adapter folders often have a tokenizer too."""
    AutoTokenizer.from_pretrained(base).save_pretrained(arm)
    config = dataclasses.replace(make_config(toy, output=str(tmp_path / "other")), base=str(arm))
    with pytest.raises(ValueError, match=r"base='.*': expected a whole model, got an adapter: merge it"):
        train(config, progress=False)


def test_stop_tokens_are_those_of_decoding(tmp_path: Path, base: Path) -> None:
    """The stop tokens come from the generation config, else from the model's config."""
    config = TrainConfig(base=str(base), data="d", output="o")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert stop_ids(config, tmp_path / "base") == {1, 7}
    (tmp_path / "base" / "generation_config.json").unlink()
    values = json.loads((base / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**values, "eos_token_id": [1, 9]}))
    assert stop_ids(config, tmp_path / "base") == {1, 9}


def test_held_out_prompts_that_are_trained_on_are_counted(make_config: Config, toy: Path) -> None:
    report = train(make_config(toy, holdout_every=None, eval_data=str(toy)), progress=False).report
    assert report["data"]["held_out_prompts_in_training"] == 48


def test_processes_that_nobody_launched_are_refused(
    make_config: Config, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2: expected RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT beside it"):
        train(make_config(toy), progress=False)


def test_what_cannot_be_served_is_refused_before_any_weights(
    make_config: Config, toy: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "falcon", "vocab_size": 300}')
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    with pytest.raises(ValueError, match=r"base: falcon models .* are not supported"):
        train(dataclasses.replace(make_config(toy), base=str(tmp_path / "base")), progress=False)


def test_the_defaults_leave_routers_and_experts_alone() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    for kind, more in (("qwen3_moe", {"num_key_value_heads": 2, "head_dim": 8, **experts}), ("llama", {})):
        config = AutoConfig.for_model(kind, vocab_size=50, **small, **more)
        names = set(default_targets(AutoModelForCausalLM.from_config(config)))
        attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert names == (attention if more else attention | {"gate_proj", "up_proj", "down_proj"})


@pytest.mark.parametrize(
    ("rows", "given", "recorded"),
    [
        ([{}, {}], {"shout": True}, {"shout": True}),
        ([{"shout": False}, {"shout": False}], {"shout": True, "loud": 1}, {"shout": False, "loud": 1}),
        ([{"shout": False}, {}], None, None),
        ([{"shout": False}, {"shout": True}], None, None),
    ],
)
def test_arguments_of_the_chat_template_are_trained_with_recorded_and_read(
    make_config: Config, write_jsonl: Callable[..., Path], base: Path, rows: Any, given: Any, recorded: Any
) -> None:
    """A row's own arguments come first. Arguments of all rows go to the ARM's template; a conflict is an error."""
    template = "{{ 'LOUD' if shout else 'low' }}{{ loud }} {{ messages[0].content }} {% for m in messages[1:] %}"
    template += "{{ m.content }}{% endfor %}"
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    chat = [{"role": "user", "content": "the cat"}]
    prompts = [[{"role": "user", "content": text}] for text in ("a dog", "a man")]
    data = write_jsonl({"prompt": p, **sides, "chat_template_kwargs": row} for p, row in zip(prompts, rows))
    options = {"holdout_every": None, "holdout_fraction": 0.0, "chat_template": template}
    result = train(make_config(data, **options, chat_template_kwargs=given), progress=False)
    assert json.loads((result.folder / "genarm.json").read_text())["chat_template_kwargs"] == recorded
    model = GenARM.from_pretrained(base, result.folder, chat_template=template)
    read = [model.tokenizer.decode(ids).split()[0] for ids in model.prepare([chat])[0].token_ids]
    loud = (recorded or {}).get("shout")
    assert read == ["low", f"{'LOUD' if loud else 'low'}{(recorded or {}).get('loud', '')}"]
    if recorded:
        with pytest.raises(ValueError, match=rf"prompts\[0\]: shout=None: expected {loud}, with which arm was trained"):
            model.prepare([chat], chat_template_kwargs={"shout": None})
        model.prepare([chat], chat_template_kwargs={"shout": loud})


def test_arguments_of_no_chat_template_are_refused(make_config: Config, toy: Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template_kwargs=\{'shout': True\}: expected none, the data is no chat"):
        train(make_config(toy, chat_template_kwargs={"shout": True}), progress=False)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "the cat", "chosen": " sat", "rejected": " on"}, {}, ("text", None)),
        ({"prompt": "the cat", "chosen": " sat", "rejected": " on"}, {"as_chat": True}, ("chat", "kept")),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {},
            ("transcript", None),
        ),
    ],
)
def test_the_format_of_prompts_is_recorded(
    make_config: Config, write_jsonl: Callable[..., Path], row: dict[str, str], options: dict[str, bool], expected: Any
) -> None:
    result = train(make_config(write_jsonl([row]), holdout_every=None, holdout_fraction=0.0, **options), progress=False)
    info = json.loads((result.folder / "genarm.json").read_text())
    assert (info["prompt_format"], info["chat_template"] and "kept") == expected
    assert (info["end_token_id"], info["trust_remote_code"]) == (1, False)
    assert result.report["lora_targets"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
