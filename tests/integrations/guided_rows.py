"""Generation by Hugging Face with the logits processor, and a check of each of its scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedModel

from genarm_fast.integrations.transformers import GenARMLogitsProcessor

PAD = 2
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [9, 8, 7]]
WEIGHTS = [0.5, -1.0]


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


class Counted:
    """A model that counts the token columns it was fed."""

    def __init__(self, inner: PreTrainedModel) -> None:
        self.inner, self.columns = inner, 0

    def __call__(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        self.columns += input_ids.shape[1]
        return self.inner(input_ids=input_ids, **kwargs)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()


class Checked(LogitsProcessor):
    """A processor that compares another processor's result with plain forwards of every row."""

    def __init__(self, guide: GenARMLogitsProcessor) -> None:
        self.guide, self.steps = guide, 0
        self.models = [member.model for member in guide.members]
        self.counted = guide.members[1].model = Counted(self.models[1])

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        given = self.guide(input_ids, scores)
        for row, own, found in zip(input_ids.tolist(), scores, given):
            start = next(i for i, token in enumerate(row) if token != PAD)
            arms = [model(torch.tensor([row[start:]])).logits[0, -1] for model in self.models[1:]]
            expected = own.log_softmax(-1)
            for arm, weight in zip(arms, self.guide.weights):
                expected = expected + weight * arm.log_softmax(-1)
            assert torch.allclose(found, expected, atol=2e-4), (row, (found - expected).abs().max())
        self.steps += 1
        return given


def generate(
    base: PreTrainedModel,
    guide: LogitsProcessor | list[LogitsProcessor],
    prompts: Sequence[Sequence[int]],
    **kwargs: object,
):
    """Return the tokens after each prompt, up to the first </s>."""
    inputs = padded(prompts)
    kwargs = {"do_sample": False, "max_new_tokens": 12, **kwargs}
    processors = guide if isinstance(guide, list) else [guide]
    rows = base.generate(**inputs, logits_processor=processors, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]
