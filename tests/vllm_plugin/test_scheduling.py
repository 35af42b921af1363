"""24 requests with different weights and similar prompts, where memory is short: preempted, resumed, shared."""

from __future__ import annotations

import random

from engines import asking, engine, generated, loaded, naive


def test_preemption_and_shared_prefixes_change_no_token(models):
    rng = random.Random(0)
    common = [rng.randrange(3, 300) for _ in range(40)]
    prompts = [common + [rng.randrange(3, 300) for _ in range(rng.randrange(1, 30))] for _ in range(24)]
    weights = [[round(rng.uniform(-1, 2), 3) for _ in range(2)] for _ in prompts]
    lengths = [rng.randrange(8, 32) for _ in prompts]
    options = {
        "block_size": 32,
        "num_gpu_blocks_override": 10,
        "max_num_batched_tokens": 64,
        "disable_log_stats": False,
        "enable_prefix_caching": True,
    }
    with engine(models, ["small", "lora1"], **options) as llm:
        asked = [asking(w, max_tokens=n) for w, n in zip(weights, lengths)]
        found = generated(llm, prompts, asked)
        counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    members = [loaded(models, name) for name in ("base", "small", "lora1")]
    for prompt, each, tokens, length in zip(prompts, weights, found, lengths):
        assert tokens == naive(members, prompt, each, length)
    assert found[0] != naive(members, prompts[0], weights[1], lengths[0])
    assert counted["vllm:num_preemptions"] > 0
    assert counted["vllm:prefix_cache_hits"] > 0
