"""Tiny models that vLLM's CPU backend can run (heads of 32 or 64), engines over them, and their expected tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from processes import end, show_stacks, started
from tiny_models import build_model, build_tokenizer, save_adapter
from transformers import AutoModelForCausalLM, PreTrainedModel

from genarm_fast import ARM, GenARM, reference
from genarm_fast.integrations.vllm import engine_args

BASE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "base": ("llama", 1, BASE),
    "small": ("llama", 3, {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}),
    "qwen": ("qwen2", 4, {"hidden_size": 128, "num_hidden_layers": 3, "num_key_value_heads": 4}),
    "padded": ("llama", 5, {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384}),
    "window": ("mistral", 6, {"hidden_size": 128, "num_key_value_heads": 2, "sliding_window": 8}),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"lora0": ["q_proj", "down_proj"], "lora1": ALL}
TEXTS = [
    "the cat sat on",
    "a man and the sea there is",
    "that and this",
    "no place like home the other thing the cat sat on the mat a man",
]
TOKENIZER = build_tokenizer()
PROMPTS = [TOKENIZER(text).input_ids for text in TEXTS]
TOKENS = 40


def save_models(folder: Path) -> None:
    for name, (family, seed, config) in MODELS.items():
        build_model(family, seed, **config).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        merged = save_adapter(folder / name, base=folder / "base", seed=seed, config=config)
        merged.save_pretrained(folder / f"{name}-merged")


def loaded(folder: Path, name: str) -> PreTrainedModel:
    """Return a member's model, with an adapter merged into its base."""
    path = folder / f"{name}-merged" if name in ADAPTERS else folder / name
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@contextmanager
def engine(folder: Path, arms: Sequence[Any], *, base: str = "base", **options: Any) -> Iterator[Any]:
    """Yield a vLLM of these members, in float32 and eager unless `options` change that. arms: names, or `ARM`s of
    names."""
    from vllm import LLM

    specs = [arm if isinstance(arm, ARM) else ARM(folder / arm, name=arm) for arm in arms]
    settings = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "uni",
    }
    before = {process.pid for process in started()}
    try:
        llm = LLM(**engine_args(folder / base, specs, **(settings | options)))
        yield llm
        llm.llm_engine.engine_core.shutdown()
    except BaseException:
        show_stacks([process for process in started() if process.pid not in before])
        raise
    finally:
        end([process for process in started() if process.pid not in before])


def generated(llm: Any, prompts: Sequence[Sequence[int]], params: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def asking(weights: Any = None, **params: Any) -> Any:
    """Return vLLM's parameters for a request, greedy unless `params` change that."""
    from vllm import SamplingParams

    extra = None if weights is None else weights if isinstance(weights, dict) else {"arm_weights": list(weights)}
    settings = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "extra_args": extra}
    return SamplingParams(**(settings | params))


def naive(
    models: Sequence[Any], prompt: Sequence[int], weights: Sequence[float], tokens: int = TOKENS, **params: Any
) -> list[int]:
    """Return the reference's tokens, from whole prefixes in float64 without a cache."""
    base, *arms = models
    params = {"temperature": 0.0, "vocab_size": 300} | params
    found = reference.generate(base, arms, [prompt] * len(models), weights, max_new_tokens=tokens, **params)
    return found.tokens


def own_engine(folder: Path, arms: Sequence[str], base: str = "base") -> GenARM:
    """Return a `GenARM` over the same members."""
    return GenARM.from_pretrained(folder / base, [ARM(folder / arm, name=arm) for arm in arms], dtype="float32")
