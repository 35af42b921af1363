"""A worker's state: each request's weights, and the sampler that draws by our random-number contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from genarm_fast.integrations.vllm.drafts import temper_drafts
from genarm_fast.integrations.vllm.request_weights import requested_weights, rewarding
from genarm_fast.integrations.vllm.sampler import CoupledVerifier, GuidedSampler, draw_by_our_contract
from genarm_fast.integrations.vllm.selfcheck import check_model


class GenARMState(DefaultModelState):
    """Weights by request slot: the base's, which is 1 or 0, then the ARMs'.

    Slots are reused, so a new request writes all weights of its slot.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.served = model.served
        self.sampler: GuidedSampler | None = None  # only on ranks that draw, see custom_sampler
        arms = len(self.served.arms)
        self.weights = StagedWriteTensor((self.max_num_reqs, 1 + arms), dtype=torch.float32, device=device)
        # CUDA graphs read these weights at this address in every step.
        self.by_token = torch.zeros(self.max_num_tokens, 1 + arms, device=device)
        # On the host: slots whose request asks for an ARM's rewards.
        self.rewarded = np.zeros(self.max_num_reqs, dtype=bool)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        asked = None if params is None else params.extra_args
        self.rewarded[req_index] = rewarding(asked, self.served) is not None
        own = 0.0 if self.rewarded[req_index] else 1.0
        self.weights.stage_write(req_index, 0, [own, *requested_weights(asked, self.served)])

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.weights.apply_write()

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Tensor | None]:
        inputs = super().prepare_inputs(input_batch, req_states)
        tokens = input_batch.num_tokens
        ends = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
        row = torch.searchsorted(ends, torch.arange(tokens, device=self.device), right=True)
        self.by_token[:tokens] = self.weights.gpu[input_batch.idx_mapping[row].long()]
        inputs["arm_weights"] = self.by_token[: input_batch.num_tokens_after_padding]
        slots = input_batch.idx_mapping_np
        self.model.rewards = bool(np.any(self.rewarded[slots]))
        self.model.returns_members = (
            not self.model.rewards and self.sampler is not None and self.sampler.takes_members(slots)
        )
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        inputs["arm_weights"] = self.by_token[:num_tokens]
        self.model.returns_members = self.model.rewards = False
        return inputs

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Check the model, and return the sampler and the verifier of drafts.

        vLLM calls this when the weights are loaded, on the ranks that draw.

        Raises:
            RuntimeError: the guided model differs from the formula, see selfcheck.py.
        """
        check_model(self.model)
        self.sampler = draw_by_our_contract(sampler)
        speculation = self.vllm_config.speculative_config
        if speculation is not None:
            temper_drafts(self)
        return self.sampler, None if speculation is None else CoupledVerifier(self.sampler, speculation, self.device)
