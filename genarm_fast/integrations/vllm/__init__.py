"""Guided decoding inside vLLM: vLLM's scheduler, paged cache, parallelism and server, with our formula and our seeds.

`engine_args` gives the arguments of `vllm.LLM` and `AsyncEngineArgs`. `register` is the entry point that vLLM calls in
each of its processes. Nothing here imports vLLM before vLLM itself is imported. docs/vllm.md is for users.
"""

from __future__ import annotations

from genarm_fast.integrations.vllm.arguments import engine_args
from genarm_fast.integrations.vllm.served import ARCHITECTURE

__all__ = ["engine_args", "register"]


def register() -> None:
    """Register our architecture with vLLM. It takes little time, and may be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from genarm_fast.integrations.vllm.config_hook import GenARMConfig

    MODELS_CONFIG_MAP[ARCHITECTURE] = GenARMConfig
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # Given as a string, the module is imported where the model is built, not in the frontend.
        ModelRegistry.register_model(ARCHITECTURE, "genarm_fast.integrations.vllm.composite:GenARMForCausalLM")
