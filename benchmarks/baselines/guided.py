"""GenARM by this library's engine, on the interface of the baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from baselines.interface import Params, Response
from genarm_fast import GenARM, SamplingParams


def guided(
    model: GenARM, weights: Sequence[float] | Mapping[str, float], prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """Without drafts a forward of each member a token, the prompt one; drafts change forwards and no token.

    A prompt of token ids is read by all members as it is. Members of weight 0 are not run.
    """
    common = SamplingParams(
        weights=weights,
        temperature=params.temperature,
        max_new_tokens=params.max_new_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=True,  # as of every method here, the stop tokens are those of the parameters
    )
    each = [common.override(seed=params.seed + i) for i in range(len(prompts))]
    outputs = model.generate([list(prompt) for prompt in prompts], each, speculation="off")
    used = ["base", *(name for name, weight in zip(model.arm_names, model.expand_weights(common.weights)) if weight)]
    return [Response(o.token_ids, Counter(dict.fromkeys(used, len(o.token_ids)))) for o in outputs]
