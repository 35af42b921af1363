"""A member of a guided decoder, the base or an ARM: a model, a tokenizer and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from genarm_fast.models.fast_modules import as_runner
from genarm_fast.models.rebound import WeightWatch
from genarm_fast.models.support import check_supported, context_of
from genarm_fast.models.weights import share_weights
from genarm_fast.text.prompts import PromptFormat


@dataclass
class Member:
    """A loaded member. `weight` is the ARM's default weight. given: somebody else has its model, and may change it.
    prompt_format: what it was trained on; None: nobody recorded that. chat_template_kwargs: what its chat template got
    with every row of the training. stop_ids: tokens that end its answers, too."""

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
    watch: WeightWatch | None = None  # of a given model
    relatives: Sequence[nn.Module] = ()  # models some of whose weights are its own as well

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
        self.shared = self.model  # runs it together with the other members that have the same one: see lora_lanes.py
        self.lane = 0

    @cached_property
    def runner(self) -> Any:
        """A copy of the module tree, over the same weights, that runs it alone over our cache."""
        return as_runner(share_weights(self.model), self.relatives)

    @property
    def runs_by(self) -> str:
        """Which forward runs it, and why: "stacked", "fused" or "its own forward"."""
        return (self.runner if self.shared is self.model else self.shared).runs_by

    @property
    def device(self) -> torch.device:
        """The device that its token ids have to be on; accelerate says which, where it brings weights in time."""
        embeddings = self.model.get_input_embeddings()
        device = embeddings.weight.device
        if device.type == "meta":
            device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None) or device
        return torch.device(device)
