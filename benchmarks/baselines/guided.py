"""GenARM decoding by this library's engine, behind the interface of the baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from baselines.interface import Params, Response
from genarm_fast import GenARM, SamplingParams


def guided(
    model: GenARM, weights: Sequence[float] | Mapping[str, float], prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """Return a response to each prompt, decoded without drafts, which would change the forwards but no token.

    Each member runs one forward per token, the prompt's among them; members of weight 0 are not run. All members read
    the same prompt ids.
    """
    common = SamplingParams(
        weights=weights,
        temperature=params.temperature,
        max_new_tokens=params.max_new_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=True,  # stop at params.stop_token_ids alone, like every method here
    )
    each = [common.override(seed=params.seed + i) for i in range(len(prompts))]
    outputs = model.generate([list(prompt) for prompt in prompts], each, speculation="off")
    used = ["base", *(name for name, weight in zip(model.arm_names, model.expand_weights(common.weights)) if weight)]
    return [Response(o.token_ids, Counter(dict.fromkeys(used, len(o.token_ids)))) for o in outputs]
