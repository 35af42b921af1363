"""Llama's modules, made wrong over a static cache in some layers, but written in transformers' style."""

from __future__ import annotations

import torch
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaModel

Wrong = torch.Tensor  # its values depend on the number of tokens in a forward


def counted(hidden_states: torch.Tensor) -> Wrong:
    return hidden_states + hidden_states.shape[1]


class OddMLP(LlamaMLP):
    def forward(self, x):
        return counted(super().forward(x))


class FlaggedMLP(LlamaMLP):
    odd = False

    def forward(self, x):
        x = super().forward(x)
        return counted(x) if self.odd else x


class EverySecond(LlamaAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return (counted(output) if self.layer_idx % 2 and self.layer_idx < 7 else output), weights


class Last(LlamaAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return (counted(output) if self.layer_idx == self.config.num_hidden_layers - 1 else output), weights


class Listed(LlamaAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return (counted(output) if self.config.odd[self.layer_idx] else output), weights


class ReadsAnother(LlamaAttention):
    """An attention that adds, from the third layer on, what the second layer has in the cache."""

    def forward(self, *args, past_key_values=None, **kwargs):
        output, weights = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.layers[1].keys is not None:
            output = output + past_key_values.layers[1].keys.mean()
        return output, weights


class Remembers(LlamaMLP):
    """An MLP that is wrong in every fifth call."""

    calls = 0

    def forward(self, x):
        Remembers.calls += 1
        x = super().forward(x)
        return counted(x) if Remembers.calls % 8 == 5 else x


class IndexedDecoder(LlamaModel):
    def forward(self, input_ids=None, position_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1])[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for i, decoder_layer in enumerate(self.layers):
            hidden_states = decoder_layer(
                hidden_states if i != 5 else counted(hidden_states),
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)
