"""Compares one member's decoding with its model's own forward in bfloat16: near, as attention of other shapes
rounds."""

from __future__ import annotations

import torch

from genarm_fast import GenARM, SamplingParams

PROMPT = [5, 9, 33, 120, 7]


def largest_difference(model: GenARM, other: torch.nn.Module) -> float:
    """Return the largest difference of ten sampled tokens' log-probs: `model` as it decodes, against the forward of
    `other`."""
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=1, logprobs=1, ignore_eos=True)
    completion = model.generate([PROMPT], params)[0].completions[0]
    ids = torch.tensor([PROMPT + completion.token_ids])
    with torch.inference_mode():
        wanted = other(ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    found = torch.tensor([each.logprob for each in completion.logprobs])
    return float((found - wanted.gather(1, ids[0, len(PROMPT) :, None])[:, 0]).abs().max())
