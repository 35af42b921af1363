"""A hook in vLLM's frontend, before weights are read. It refuses settings that would give other tokens."""

from __future__ import annotations

from typing import Any

import vllm
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from genarm_fast.integrations.vllm.prompts import load_base_tokenizer, member_tokenizers, shared_tokens
from genarm_fast.integrations.vllm.served import Served, ServedARM, check_version
from genarm_fast.integrations.vllm.validator import validator_name
from genarm_fast.models.support import CACHED_LAYERS, context_of

V1_RUNNER_ERROR = (
    "GenARM runs on vLLM's V2 model runner, and this engine would take V1: set VLLM_USE_V2_MODEL_RUNNER=1, and leave"
    " away what the warning above names"
)


class GenARMConfig(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check all settings, and add the validator of requests' weights.

        Raises:
            ValueError, RuntimeError: a setting, a member or a version of vLLM that is not supported.
        """
        check_version(vllm.__version__)
        model_config = vllm_config.model_config
        served = Served.of(model_config.hf_config)
        _check_engine(vllm_config, served)
        configs = [AutoConfig.from_pretrained(arm.model, trust_remote_code=arm.trust_remote_code)
                   for arm in served.arms if not arm.lane]  # fmt: skip
        for arm, config in zip([arm for arm in served.arms if not arm.lane], configs):
            _check_member(arm, config, vllm_config)
        base = load_base_tokenizer(
            model_config.tokenizer,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        tokenizers = member_tokenizers(base, served.arms)
        widths = [model_config.get_vocab_size(), *(config.get_text_config().vocab_size for config in configs)]
        size = shared_tokens(tokenizers, widths, ["base", *served.names])
        model_config.hf_config.genarm_vocab_size = size
        name = validator_name(served)
        if name not in (model_config.logits_processors or ()):
            model_config.logits_processors = [*(model_config.logits_processors or ()), name]


def _check_engine(config: Any, served: Served) -> None:
    """Raises ValueError for features of vLLM that our model does not support."""
    model = config.model_config
    if not config.use_v2_model_runner:
        raise ValueError(V1_RUNNER_ERROR)
    stages, lanes = config.parallel_config.pipeline_parallel_size, [arm.name for arm in served.arms if arm.lane]
    wrong = {
        # vLLM passes the rows of a batch from stage to stage, and lanes have several rows for each.
        "pipeline_parallel_size": (stages > 1 and lanes, f"1 with LoRA lanes, which {', '.join(lanes)} would be"),
        "enable_lora": (config.lora_config is not None, "none beside ARMs; a LoRA ARM is given to engine_args"),
        "enable_dbo, ubatch_size": (config.parallel_config.use_ubatching, "no microbatches, which would mix weights"),
        "base with MLA": (model.use_mla, "full or sliding-window attention"),
        "enable_prompt_embeds": (model.enable_prompt_embeds, "token ids, which all members read"),
        "runner": (model.runner_type != "generate", "text generation"),
    }
    for name, (found, expected) in wrong.items():
        if found:
            raise ValueError(f"GenARM in vLLM: {name}: expected {expected}")
    own = AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code, revision=model.revision)
    _check_kind("base", own, model)


def _check_member(arm: ServedARM, config: Any, vllm_config: Any) -> None:
    text = config.get_text_config()
    _check_kind(arm.name, config, vllm_config.model_config)
    context, length = context_of(text), vllm_config.model_config.max_model_len
    if context is not None and length > context:
        raise ValueError(f"max_model_len={length}: expected at most {context}, the context of {arm.name}")
    heads, parts = text.num_attention_heads, vllm_config.parallel_config.tensor_parallel_size
    if heads % parts:
        raise ValueError(f"tensor_parallel_size={parts}: expected a divisor of {heads}, the heads of {arm.name}")


def _check_kind(name: str, config: Any, model_config: Any) -> None:
    """Raises ValueError for a member that is no plain decoder, by its configuration and by vLLM's description of it."""
    text = config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - CACHED_LAYERS
    if config.is_encoder_decoder or other or not hasattr(text, "num_attention_heads"):
        kinds = ", ".join(sorted(other)) or config.model_type
        raise ValueError(f"{name}: {kinds}: expected a decoder with full or sliding-window attention")
    info, _ = ModelRegistry.inspect_model_cls(config.architectures or [], model_config)
    wrong = {
        "a multimodal model": info.supports_multimodal,
        "a hybrid model": info.is_hybrid or info.has_inner_state,
        "a model without attention": info.is_attention_free,
        "no text generation": not info.is_text_generation_model,
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise ValueError(f"{name}: {', '.join(found)}: expected a decoder with full or sliding-window attention")
