"""Guided decoding inside vLLM: its scheduler, paged cache, parallelism and OpenAI server, with our law and our seeds.

`engine_args` gives the arguments of `vllm.LLM` and `AsyncEngineArgs`. `register` is the entry point that vLLM calls in
each of its processes. Nothing here imports vLLM before vLLM itself is imported; docs/vllm.md is for users.
"""

from __future__ import annotations

from genarm_fast.integrations.vllm.arguments import engine_args
from genarm_fast.integrations.vllm.served import ARCHITECTURE

__all__ = ["engine_args", "register"]


def register() -> None:
    """Tell vLLM of our architecture. Light, and does no harm if called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from genarm_fast.integrations.vllm.config_hook import GenARMConfig

    MODELS_CONFIG_MAP[ARCHITECTURE] = GenARMConfig
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # As a string: the module is imported where the model is built, not in the frontend.
        ModelRegistry.register_model(ARCHITECTURE, "genarm_fast.integrations.vllm.composite:GenARMForCausalLM")
