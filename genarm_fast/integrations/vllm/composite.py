"""The guided model as vLLM sees it: one model, whose sub-modules are the base and its ARMs.

`forward` runs all members over the same tokens. Each member has its own key-value cache, in the blocks of the same
request. The result holds the members' hidden states and the row's weights side by side. So `compute_logits`, which vLLM
also calls for prompt log-probabilities and for drafts, needs to know nothing about rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.sequence import IntermediateTensors

from genarm_fast.integrations.vllm.lanes import add_lanes, load_lanes
from genarm_fast.integrations.vllm.member_logits import MemberLogits
from genarm_fast.integrations.vllm.served import Served, ServedARM

# A float32 weight is the exact sum of this many bfloat16 numbers: 3 x 8 bits.
WEIGHT_PARTS = 3


class GenARMForCausalLM(nn.Module, SupportsPP):
    """A base with lanes, and further ARMs beside it. Attributes `base`, `arm0`, `arm1`, ... are vLLM's own models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.served = Served.of(self.config)
        self.arms = len(self.served.arms)
        lanes = [arm for arm in self.served.arms if arm.lane]
        beside = [arm for arm in self.served.arms if not arm.lane]
        with add_lanes(vllm_config, len(lanes)) as lane_config:
            # Without a prefix, the base's layers have the names of the checkpoint, which quantisation lists.
            self.base = initialize_model(_base_config(lane_config), prefix="")
        self.lanes = 1 + len(lanes)
        self.names = ["base", *(f"arm{i}" for i in range(len(beside)))]
        sizes = [self.config.get_text_config().hidden_size] * self.lanes
        self.secondary_weights = []
        for name, arm in zip(self.names[1:], beside):
            config = _arm_config(vllm_config, arm)
            setattr(self, name, initialize_model(config, prefix=name))
            sizes.append(config.model_config.hf_config.get_text_config().hidden_size)
            self.secondary_weights.append(DefaultModelLoader.Source(arm.model, None, prefix=f"{name}."))
        self.sizes = [*sizes, *[1 + self.arms] * WEIGHT_PARTS]
        # Rows of `compute_logits` have the lanes first; weights have the order of the ARMs.
        self.order = [i for i, arm in enumerate(self.served.arms) if arm.lane]
        self.order += [i for i, arm in enumerate(self.served.arms) if not arm.lane]
        self.vocab_size = self.served.vocab_size or vllm_config.model_config.get_vocab_size()
        self.rewards = False  # whether some rows of the step are an ARM's rewards, without the base
        self.returns_members = False  # whether the next `compute_logits` returns the members' logits separately

    @staticmethod
    def get_model_state_cls() -> type:
        from genarm_fast.integrations.vllm.state import GenARMState

        return GenARMState

    def members(self) -> list[Any]:
        """Return the models, each once. Lanes are in the base."""
        return [getattr(self, name) for name in self.names]

    def heads(self) -> list[Any]:
        """Return the model whose head reads each part of the hidden states; the base's head also reads the lanes."""
        return [self.base] * self.lanes + self.members()[1:]

    @staticmethod
    def parts(weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return float32 numbers as WEIGHT_PARTS tensors of a narrower type, whose sum is exact."""
        parts = []
        for _ in range(WEIGHT_PARTS):
            parts.append(weights.to(dtype))
            weights = weights - parts[-1].float()
        return parts

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.members()[0].embed_input_ids(input_ids)

    def make_empty_intermediate_tensors(self, batch_size: int, dtype: torch.dtype, device: Any) -> IntermediateTensors:
        rows = [batch_size * self.lanes, *[batch_size] * (len(self.names) - 1)]
        made: dict[str, Tensor] = {}
        for name, member, count in zip(self.names, self.members(), rows):
            empty = member.make_empty_intermediate_tensors(count, dtype, device)
            made.update((f"{name}.{key}", value) for key, value in empty.items())
        return IntermediateTensors(made)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        arm_weights: Tensor | None = None,
        **_: Any,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states of tokens, [N, sum of the members' sizes + 3 (1 + m)]. A weight takes three numbers.

        arm_weights: float32 [N, 1 + m], the base's weight, 1 or 0, and then the ARMs' in their order.
        """
        outputs: list[Any] = []
        for name, member in zip(self.names, self.members()):
            received = _received(name, intermediate_tensors)
            if name == "base" and self.lanes > 1:
                outputs.append(member(input_ids.repeat(self.lanes), positions.repeat(self.lanes), received))
            else:
                outputs.append(member(input_ids, positions, received))
        if isinstance(outputs[0], IntermediateTensors):
            sent = {f"{name}.{key}": t for name, out in zip(self.names, outputs) for key, t in out.tensors.items()}
            return IntermediateTensors(sent)
        hidden = [*outputs[0].chunk(self.lanes), *outputs[1:]]
        if arm_weights is None:  # a profiling run, whose result nobody reads
            arm_weights = torch.zeros(len(hidden[0]), 1 + self.arms, device=hidden[0].device)
        return torch.cat([*hidden, *self.parts(arm_weights[: len(hidden[0])], hidden[0].dtype)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | MemberLogits | None:
        """Return combined logits, float32 [N, V] of the base's width, with -inf beyond the common vocabulary.

        If the step has set `returns_members`, return the members' separate logits instead. It holds for one call,
        because prompt log-probabilities call this again in the same step. None on a tensor-parallel rank that draws
        nothing.
        """
        returns_members, self.returns_members = self.returns_members, False
        logits = self.member_logits(hidden_states)
        if returns_members or logits is None:
            return logits
        return logits.combined(self.rewards)

    def member_logits(self, hidden_states: Tensor) -> MemberLogits | None:
        """Apply each member's head to its part of the hidden states. Lanes share one read of the base's head."""
        rows, lanes = len(hidden_states), self.lanes
        *hidden, a, b, c = hidden_states.split([sum(self.sizes[:lanes]), *self.sizes[lanes:]], dim=-1)
        weights = a.float() + b.float() + c.float()
        stacked = self.base.compute_logits(hidden[0].reshape(rows * lanes, -1).contiguous())
        beside = [member.compute_logits(each.contiguous()) for member, each in zip(self.members()[1:], hidden[1:])]
        if stacked is None or any(each is None for each in beside):
            return None
        base, *arms = stacked.unflatten(0, (rows, lanes)).unbind(1)
        return MemberLogits(base, (*arms, *beside), weights[:, 1:][:, self.order], weights[:, 0], self.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        beside = tuple(f"{name}." for name in self.names[1:])

        def named() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                yield (name if name.startswith(beside) else f"base.{name}"), tensor

        loaded = AutoWeightsLoader(self).load_weights(named())
        load_lanes(self.base, [arm for arm in self.served.arms if arm.lane])
        return loaded


def _base_config(vllm_config: VllmConfig) -> VllmConfig:
    """Return the configuration with the base's own architecture in place of the guided model's."""
    model = vllm_config.model_config
    own = AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code, revision=model.revision)
    return vllm_config.with_hf_config(copy.deepcopy(model.hf_config), architectures=own.architectures)


def _arm_config(vllm_config: VllmConfig, arm: ServedARM) -> VllmConfig:
    """Return a configuration for an ARM, made as vLLM makes one for draft models.

    Window, dtype and quantisation are the ARM's own.
    """
    base = vllm_config.model_config
    model = ModelConfig(
        model=arm.model,
        runner="draft",
        tokenizer=base.tokenizer,
        trust_remote_code=arm.trust_remote_code,
        dtype=base.dtype,
        seed=base.seed,
        max_model_len=base.max_model_len,
        enforce_eager=base.enforce_eager,
    )
    cache = replace(vllm_config.cache_config, sliding_window=model.get_sliding_window())
    return replace(vllm_config, model_config=model, quant_config=None, cache_config=cache)


def _received(name: str, tensors: IntermediateTensors | None) -> IntermediateTensors | None:
    """Return the tensors that the previous pipeline stage sent for a member."""
    if tensors is None:
        return None
    start = f"{name}."
    return IntermediateTensors({k.removeprefix(start): t for k, t in tensors.tensors.items() if k.startswith(start)})
