"""Drafts of vLLM's draft model, drawn as our drafters draw: tempered by all members' weight, with the target's noise.

A draft is right if it is the token that the target draws. vLLM's own drafts are the most probable tokens, which a
request with a temperature seldom draws.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from genarm_fast.kernels import guided_sample


class DraftState(Protocol):
    """The fields of a worker's state that drafts need. weights: [slots, 1 + ARMs], the base's weight first."""

    vllm_config: Any
    served: Any
    weights: Any
    sampler: Any


_states: WeakValueDictionary[int, DraftState] = WeakValueDictionary()  # states by the id of the config that they hold
_own = StandaloneARSpeculator.sample_draft


def temper_drafts(state: DraftState) -> None:
    """Make this worker's draft model, if it has one, draw tempered drafts. Other engines are unchanged."""
    _states[id(state.vllm_config)] = state
    StandaloneARSpeculator.sample_draft = _sample_draft


def _sample_draft(
    self: Any,
    hidden_states: Tensor,
    sample_src_positions: Tensor,
    idx_mapping: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    draft_step: Tensor,
    draft_logits: Tensor | None,
    spec_step_idx: int = 0,
) -> Tensor:
    """Return drafts int64 [R] that follow the tokens at these positions. Slot -1 marks rows that nobody reads."""
    state = _states.get(id(self.vllm_config))
    if state is None or draft_logits is not None or self.use_local_argmax_reduction:
        rows = (hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step, draft_logits)
        drafts: Tensor = _own(self, *rows, spec_step_idx)
        return drafts
    logits = self.compute_draft_logits(hidden_states, spec_step_idx)
    slots = idx_mapping.long().clamp_min(0)
    total = state.weights.gpu[slots].sum(1)
    prompt = state.sampler.req_states.prompt_len.gpu[slots]
    drafts = guided_sample(
        logits.float(),
        (),
        logits.new_empty(len(logits), 0, dtype=torch.float32),
        vocab_size=state.served.vocab_size,
        temperature=temperature[slots] / torch.where(total > 0, total, 1.0),
        seeds=seeds[slots],
        positions=(sample_src_positions + 1 - prompt).long().clamp_min(0),
    ).tokens
    self._maybe_predict_acceptance(logits, idx_mapping, draft_step)
    return drafts
