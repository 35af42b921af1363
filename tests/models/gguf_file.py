"""Writes a GGUF file of a tiny Llama, as llama.cpp's converter and quantiser would write it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: str = "Q4_1", ends: str = "Q8_0"
) -> dict[str, Tensor]:
    """Write the file; return the weights that it stands for, float32, by the model's names.

    layers, ends: GGUF types of the linears, and of embedding and head.
    """
    config, stood_for = model.config, {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([3, 3, *[1] * (len(vocabulary["vocab"]) - 2)])  # two control tokens, then ordinary ones
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        at_end = stem in ENDS
        if at_end:
            stored = ENDS[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            stored = f"blk.{layer}.{NAMES[part]}"
        values = tensor.float().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-1])
        order = np.arange(len(values))
        if heads:  # the halves of a head, which rotate together, become neighbours
            order = order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        kind = gguf.GGMLQuantizationType[(ends if at_end else layers) if values.ndim == 2 else "F32"]
        data = quantize(values[order], kind) if values.ndim == 2 else values
        writer.add_tensor(f"{stored}.weight", data, raw_dtype=kind)
        made = dequantize(data, kind) if values.ndim == 2 else values
        stood_for[name] = torch.from_numpy(made[np.argsort(order)].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stood_for
