"""The guided model as vLLM sees it: one model, whose sub-modules are the base and its ARMs.

`forward` runs all members over the same tokens. Each has its own key-value cache, in the blocks of the same request.
Its result is the members' hidden states and the row's weights side by side, so that `compute_logits`, which vLLM also
calls for prompt log-probabilities and for drafts, needs to know nothing of rows.
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

PARTS = 3  # a float32 weight as so many bfloat16 numbers, whose sum it is exactly: 3 x 8 bits


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
            # Without a prefix, the base's layers have their names in the checkpoint, as quantisation lists them.
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
        self.sizes = [*sizes, *[1 + self.arms] * PARTS]
        # Rows of `compute_logits` come lanes first; weights come in the order of the ARMs.
        self.order = [i for i, arm in enumerate(self.served.arms) if arm.lane]
        self.order += [i for i, arm in enumerate(self.served.arms) if not arm.lane]
        self.vocab_size = self.served.vocab_size or vllm_config.model_config.get_vocab_size()
        self.rewards = False  # whether the step has rows that are an ARM's rewards, without the base
        self.apart = False  # whether the next `compute_logits` leaves the members' logits as they are

    @staticmethod
    def get_model_state_cls() -> type:
        from genarm_fast.integrations.vllm.state import GenARMState

        return GenARMState

    def members(self) -> list[Any]:
        """The models, each once: lanes are in the base."""
        return [getattr(self, name) for name in self.names]

    def heads(self) -> list[Any]:
        """For each part of the hidden states the model whose head reads it: the base for itself and for its lanes."""
        return [self.base] * self.lanes + self.members()[1:]

    @staticmethod
    def parts(weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """float32 numbers as PARTS tensors of a narrower type, whose sum is exact."""
        parts = []
        for _ in range(PARTS):
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
        """Hidden states of tokens [N]: [N, sum of the members' sizes + 3 (1 + m)]: weights are three parts each.

        arm_weights: float32 [N, 1 + m], the base's, 1 or 0, and then in the order of the ARMs.
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
        """Combined logits, float32 [N, V] of the base's width; -inf behind the tokens that all members share.

        The members' own where the step asked for those, by `apart`, which holds for one call: prompt
        log-probabilities call again in the same step. None on a tensor-parallel rank that draws nothing.
        """
        apart, self.apart = self.apart, False
        logits = self.member_logits(hidden_states)
        if apart or logits is None:
            return logits
        return logits.combined(self.rewards)

    def member_logits(self, hidden_states: Tensor) -> MemberLogits | None:
        """Each member's head on its own part of the hidden states; lanes share one read of the base's head."""
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
    """The configuration with the base's own architecture back in it, where ours stands in its place."""
    model = vllm_config.model_config
    own = AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code, revision=model.revision)
    return vllm_config.with_hf_config(copy.deepcopy(model.hf_config), architectures=own.architectures)


def _arm_config(vllm_config: VllmConfig, arm: ServedARM) -> VllmConfig:
    """A configuration of the ARM's own, as vLLM makes one for draft models: window, dtype and quantisation are its."""
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
    """What the pipeline stage before this one sent of a member."""
    if tensors is None:
        return None
    start = f"{name}."
    return IntermediateTensors({k.removeprefix(start): t for k, t in tensors.tensors.items() if k.startswith(start)})
