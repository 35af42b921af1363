"""Tiny members, and the check of a method's draws against its enumerated law."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

VOCAB, STOP, LENGTH, DRAWS = 6, 5, 2, 1500
PROMPT = [1, 3, 2]


@pytest.fixture(autouse=True, scope="session")
def benchmarks_on_path() -> Iterator[None]:
    """Put the folder of the benchmarks on the path: they are no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "baselines"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def lm(tiny_model: Callable[..., PreTrainedModel]) -> Callable[[int], Any]:
    """lm(seed): a member over a random model of six tokens."""

    def make(seed: int, name: str | None = None) -> Any:
        from baselines.interface import Member

        return Member(name or f"lm{seed}", tiny_model(seed=seed, vocab_size=VOCAB))

    return make


@pytest.fixture(scope="session")
def judge(tiny_model: Callable[..., PreTrainedModel]) -> Callable[[int], Any]:
    """judge(seed): a random `TrajectoryReward` over six tokens, with rewards large enough to matter."""

    def make(seed: int) -> Any:
        from baselines.trajectory_reward import TrajectoryReward

        config = AutoConfig.for_model(**tiny_model(vocab_size=VOCAB).config.to_dict() | {"num_labels": 1})
        torch.manual_seed(seed)
        return TrajectoryReward(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval())

    return make


def texts() -> list[tuple[int, ...]]:
    """Return every response of up to LENGTH tokens."""
    short = [(*head, STOP) for n in range(LENGTH) for head in itertools.product(range(STOP), repeat=n)]
    return short + list(itertools.product(range(STOP), repeat=LENGTH))


@torch.inference_mode()
def logits(member: Any, tokens: Sequence[int]) -> Tensor:
    """Return the model's logits after PROMPT and these tokens, without a cache, float64 [V]."""
    return member.model(input_ids=torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].double()


def law(scores: Callable[[tuple[int, ...]], Tensor]) -> dict[tuple[int, ...], float]:
    """Return the probability of every response whose next token is drawn from softmax(scores(tokens so far))."""
    found = {}
    for text in texts():
        parts = [scores(text[:i]).log_softmax(-1)[token].item() for i, token in enumerate(text)]
        found[text] = math.exp(sum(parts))
    assert sum(found.values()) == pytest.approx(1)
    return found


def drawn(run: Callable[[list[list[int]], Any], list[Any]]) -> Counter[tuple[int, ...]]:
    """Count DRAWS responses of a method to PROMPT."""
    from baselines.interface import Params

    params = Params(max_new_tokens=LENGTH, seed=7, stop_token_ids=(STOP,))
    return Counter(tuple(response.tokens) for response in run([PROMPT] * DRAWS, params))


def misfit(expected: dict[tuple[int, ...], float], found: Counter[tuple[int, ...]]) -> float:
    """Return χ² of the draws under a law, in standard deviations above its mean. A value above 5 means another law."""
    likely = {text: DRAWS * p for text, p in expected.items() if DRAWS * p >= 5}
    rest = max(DRAWS - sum(likely.values()), 1.0)  # rare and impossible responses form one cell
    others = DRAWS - sum(found[text] for text in likely)
    cells = [*((found[text], count) for text, count in likely.items()), (others, rest)]
    freedom = len(cells) - 1
    assert freedom >= 2
    return (sum((seen - count) ** 2 / count for seen, count in cells) - freedom) / (2 * freedom) ** 0.5


@pytest.fixture
def enumerated() -> SimpleNamespace:
    return SimpleNamespace(law=law, logits=logits, misfit=misfit, drawn=drawn, prompt=PROMPT, stop=STOP)
