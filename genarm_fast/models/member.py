"""A member of a guided decoder, the base or an ARM: a model, a tokenizer and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.rebound import WeightWatch
from genarm_fast.models.support import check_supported, context_of
from genarm_fast.models.weights import share_weights
from genarm_fast.text.prompts import PromptFormat


@dataclass
class Member:
    """A loaded member.

    weight: the ARM's default weight. given: whether the caller passed a loaded model, which the caller may change
    later. prompt_format: the format of the prompts that the ARM was trained on; None if nobody recorded it.
    chat_template_kwargs: the arguments that the chat template got for every row of the training. stop_ids: tokens that
    also end an answer, besides those of the base's configuration.
    """

    name: str
    model: Any  # a transformers causal LM in eval mode
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None = None
    chat_template: str | None = None
    weight: float = 1.0
    given: bool = False
    prompt_format: PromptFormat | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    watch: WeightWatch | None = None  # only for a given model
    relatives: Sequence[nn.Module] = ()  # all members' models; they may share weights with this one

    def __post_init__(self) -> None:
        check_supported(self.name, type(self.model), self.model.config)
        for name, template in (("prompt_template", self.prompt_template), ("chat_template", self.chat_template)):
            if template is not None and not isinstance(template, str):
                raise TypeError(f"{self.name}: {name}={template!r}: expected a string")
        named = self.tokenizer.chat_template if isinstance(self.tokenizer.chat_template, dict) else ()
        if self.chat_template is not None and "{" not in self.chat_template and self.chat_template not in named:
            raise ValueError(f"{self.name}: chat_template={self.chat_template!r:.80}: expected a Jinja template's text")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"{self.name}: prompt_template={self.prompt_template!r}: expected a text with {{prompt}} in it"
            )
        text = self.model.config.get_text_config()
        # Width of the logits. Somebody may have cut a given model's output layer, and left its config as it was.
        rows = getattr(self.model.get_output_embeddings(), "out_features", None)
        self.vocab_size: int = min(text.vocab_size, rows) if isinstance(rows, int) else text.vocab_size
        self.context = context_of(text)
        if self.context is not None and self.context < 1:
            raise ValueError(f"{self.name}: max_position_embeddings={self.context}: expected at least 1")
        # The module tree that runs this member. Members with the same tree share one forward, see lora_lanes.py.
        self.shared = self.model
        self.lane = 0

    @cached_property
    def runner(self) -> Any:
        """A copy of the module tree, over the same weights, that runs this member alone over our cache."""
        return make_fast(share_weights(self.model), self.relatives)

    @property
    def runs_by(self) -> str:
        """Which forward runs the member, and why: the text begins with "stacked", "fused" or "its own forward"."""
        return (self.runner if self.shared is self.model else self.shared).runs_by

    @property
    def device(self) -> torch.device:
        """The device on which the member's token ids must be.

        Embeddings on the meta device get their weights from accelerate during a call; accelerate's hook then names the
        device.
        """
        embeddings = self.model.get_input_embeddings()
        device = embeddings.weight.device
        if device.type == "meta":
            device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None) or device
        return torch.device(device)
