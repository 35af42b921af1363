"""Draw tokens as genarm_fast does: a token depends only on its logits, its request's seed and its position.

So a request with a seed gets the tokens that `GenARM.generate` gives, in any batch, with drafts too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from genarm_fast.integrations.vllm.member_logits import MemberLogits
from genarm_fast.kernels import guided_sample

logger = init_logger(__name__)
# Steps between two checks for failed rows. Each check waits for the GPU.
CHECK_EVERY = 256


class GuidedSampler(Sampler):
    """vLLM's sampler with our draw. Bias, penalties, bad words, grammars and log-probabilities stay vLLM's."""

    failed: Tensor
    steps: int
    adjusts: np.ndarray  # [slots]: whether a bias, penalty, processor or budget changes the request's logits
    reads: np.ndarray  # [slots]: whether those, a grammar or log-probabilities read its combined logits

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Add a request as vLLM does, and remember what it needs. vLLM's own mark also covers temperature."""
        changed = self.thinking_budget_state.add_request(req_idx, sampling_params)
        for processor in self.logits_processors:
            changed |= processor.add_request(req_idx, sampling_params)
        filtered = self.sampling_states.add_request(req_idx, sampling_params)
        self.needs_logits_processing[req_idx] = filtered or changed
        self.logprob_token_ids_state.add_request(req_idx, sampling_params)
        if self.trace_replay_state is not None:
            self.trace_replay_state.add_request(req_idx, sampling_params)
        asked = (sampling_params.logprobs, sampling_params.logprob_token_ids, sampling_params.structured_outputs)
        self.adjusts[req_idx] = changed
        self.reads[req_idx] = changed or any(each is not None for each in asked)

    def takes_members(self, requests: np.ndarray) -> bool:
        """Whether a step of these slots needs only the members' separate logits."""
        return not (self.compute_nans or self.return_sampling_mask or np.any(self.reads[requests]))

    def sample(
        self,
        logits: Tensor | MemberLogits,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        pos: Tensor,
        input_ids: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        return_logprobs: bool = False,
    ) -> tuple[Tensor, Tensor | MemberLogits]:
        """Return tokens int64 [N] for logits [N, V], and the logits from which log-probabilities are computed."""
        rows = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos)
        tokens = self.draw(logits, *rows, seq_lens_upper_bound_np)
        if isinstance(logits, Tensor) and return_logprobs and self.logprobs_mode in PROCESSED_LOGPROBS_MODES:
            logits = self.apply_sampling_params(logits, *rows, seq_lens_upper_bound_np)
        return tokens, logits

    def draw(
        self,
        logits: Tensor | MemberLogits,
        slots: Tensor,
        requests: Tensor,
        requests_np: np.ndarray,
        pos: Tensor,
        *rest: Any,
    ) -> Tensor:
        """Draw tokens int64 [N]. Penalties come first; temperature, top-k, top-p and min-p are one kernel."""
        members: Any
        if isinstance(logits, MemberLogits):
            members = (logits.base, logits.arms, logits.weights)
            size = logits.vocab_size
        else:
            if np.any(self.adjusts[requests_np]):
                logits = self._adjusted(logits, slots, requests, requests_np, pos, *rest)
            members = (logits.float(), (), logits.new_empty(len(logits), 0, dtype=torch.float32))
            size = logits.shape[-1]
        slots = slots.long()
        states = self.sampling_states
        filters: dict[str, Any] = {}
        if np.any(states.top_k.np[requests_np] < states.vocab_size):
            top_k = states.top_k.gpu[slots].long()
            filters["top_k"] = torch.where(top_k >= states.vocab_size, 0, top_k)
        if np.any(states.top_p.np[requests_np] < 1):
            filters["top_p"] = states.top_p.gpu[slots]
        if np.any(states.min_p.np[requests_np] > 0):
            filters["min_p"] = states.min_p.gpu[slots]
        drawn = guided_sample(
            *members,
            vocab_size=size,
            temperature=states.temperature.gpu[slots],
            seeds=states.seeds.gpu[slots],
            positions=(pos + 1 - self.req_states.prompt_len.gpu[slots]).long().clamp_min(0),
            **filters,
        )
        self._report_failed_rows(drawn.status)
        return drawn.tokens

    def _adjusted(
        self,
        logits: Tensor,
        slots: Tensor,
        requests: Tensor,
        requests_np: np.ndarray,
        pos: Tensor,
        input_ids: Tensor,
        local_pos: Tensor,
        lengths_np: np.ndarray,
    ) -> Tensor:
        """Apply bias, penalties, bad words, processors and budgets to log-probabilities.

        Logits would give other results, because penalties depend on the sign of a number.
        """
        logits = logits.float().log_softmax(-1)
        context = LogitsContext(slots, requests, requests_np, local_pos, input_ids, pos, lengths_np)
        for processor in self.logits_processors:
            logits = processor.apply(logits, context)
        self.thinking_budget_state.apply(logits, context)
        return logits

    def _report_failed_rows(self, status: Tensor) -> None:
        """Log that rows could not be drawn, because a member gave NaN or every token is masked."""
        self.failed |= (status != 0).any()
        self.steps += 1
        if (status.device.type == "cpu" or self.steps % CHECK_EVERY == 0) and bool(self.failed):
            logger.error("GenARM: a row of logits has NaN, +inf or no token left; its tokens are id 0, not drawn")
            self.failed.zero_()


def draw_by_our_contract(sampler: Sampler) -> GuidedSampler:
    """Make vLLM's sampler, which holds its requests' settings, draw as genarm_fast does.

    Raises:
        TypeError: a sampler that is not vLLM's plain one, such as one that adds watermarks.
    """
    if type(sampler) is not Sampler:
        raise TypeError(f"sampler of {type(sampler).__name__}: expected vLLM's plain one; ours takes no watermark")
    sampler.__class__ = GuidedSampler
    assert isinstance(sampler, GuidedSampler)
    sampler.failed = torch.zeros((), dtype=torch.bool, device=sampler.req_states.device)
    sampler.steps = 0
    sampler.adjusts, sampler.reads = (np.zeros_like(sampler.needs_logits_processing) for _ in range(2))
    return sampler


class CoupledVerifier(RejectionSampler):
    """Accepts a draft if it is the token that plain decoding would draw there, with the noise of that position.

    The token that is kept is always the target's. So drafts never change a text, sampled or greedy, whichever model
    drafts.
    """

    def _verify(
        self,
        logits: Tensor | MemberLogits,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor | MemberLogits, Tensor, Tensor]:
        """Return logits for log-probabilities [N, V], targets int64 [R, K + 1], and how many each request keeps [R]."""
        rows = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos)
        targets, processed = self.sampler.sample(logits, *rows, seq_lens_upper_bound_np, return_logprobs=True)
        starts, counts = cu_num_logits[:-1].long(), cu_num_logits.diff().long()
        steps = torch.arange(self.num_speculative_steps + 1, device=targets.device)
        index = (starts[:, None] + steps).clamp_max(len(targets) - 1)
        tokens = targets[index]
        # Row j holds the draft that was its input; that draft was proposed for the target of row j - 1.
        accepted = tokens[:, :-1] == verify_draft_sampled[index[:, 1:]]
        accepted &= steps[1:] < counts[:, None]
        return processed, tokens, 1 + accepted.cumprod(-1).sum(-1).to(torch.int32)
