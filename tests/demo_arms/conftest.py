"""Puts the scripts on the path: they are no package and import each other by name."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "demo_arms"))


@pytest.fixture
def response() -> dict[str, np.ndarray]:
    """One response of five tokens, as teacher_data.py stores it; ids are below 300."""
    rng = np.random.default_rng(0)
    n = 5
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(200), n)))[:, ::-1]
    ids = np.stack([rng.permutation(300)[:56] for _ in range(n)]).astype(np.uint16)
    return {
        "prompt_tokens": np.array([3, 4, 5], np.uint16),
        "tokens": rng.integers(0, 300, n).astype(np.uint16),
        "top_ids": ids[:, :48],
        "top_logprobs": logprobs[:, :48].astype(np.float16),
        "tail_ids": ids[:, 48:],
    }
