"""`genarm-fast serve`, as far as it works without vLLM; tests/vllm_plugin tests the server."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tiny_models import build_model

from genarm_fast.cli.serve import how_to_call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    for name, layers in (("base", 2), ("small", 1)):
        build_model("llama", 0, num_hidden_layers=layers).save_pretrained(folder / name)
    return folder


def test_a_plan_takes_the_options_of_vllm_that_it_depends_on(cli: Callable, folder):
    members = ("--base", str(folder / "base"), "--arm", f"kind:{folder / 'small'}=0.5")
    shown = cli("serve", "--plan", *members, "-tp", "2", "--max-model-len", "100", "--seed", "1").out
    assert "a GPU of 2 (tensor parallel 2" in shown
    assert "requests of 100 tokens" in shown
    assert "kind" in shown


def test_without_vllm_it_says_what_to_install(cli: Callable, folder):
    result = cli("serve", "--base", str(folder / "base"), "--arm", str(folder / "small"))
    assert result.code == 1
    assert "pip install 'genarm-fast[vllm]'" in result.err


def test_options_of_nobody_are_refused_elsewhere(cli: Callable):
    result = cli("score", "--base", "b", "--prompt", "p", "--response", "r", "--tensor-parallel-size", "2")
    assert result.code == 2
    assert "unrecognized arguments: --tensor-parallel-size 2" in result.err


def test_the_call_it_shows_names_each_arm():
    args = SimpleNamespace(served_model_name=None, host=None, port=8000)
    shown = how_to_call(args, "base", {"kind": 0.5, "terse": -1.0})
    assert "http://localhost:8000/v1/chat/completions" in shown
    assert '{"arm_weights.kind": 0.5, "arm_weights.terse": -1}' in shown
