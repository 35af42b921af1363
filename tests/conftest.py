"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GENARM_FAST_SELFCHECK"] = "always"  # tests neither trust nor write the user's self-check records

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import VOCAB_SIZE, build_model, build_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from genarm_fast import GenARM

CUDA_IS_AVAILABLE, ACCELERATOR_IS_AVAILABLE = torch.cuda.is_available, torch.accelerator.is_available
torch.set_num_threads(1)
pytest.register_assert_rewrite("against_reference")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens: <s>, </s>, 256 bytes, merges. No pad token, no special tokens added."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the vocabulary of `tokenizer` that prepends <s>."""
    return build_tokenizer(add_bos=True)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """tiny_model(family="llama", seed=0, vocab_size=300, **config): a random float32 model, made once."""
    made: dict[str, PreTrainedModel] = {}

    def make(family: str = "llama", seed: int = 0, vocab_size: int = VOCAB_SIZE, **config: object) -> PreTrainedModel:
        key = repr((family, seed, vocab_size, sorted(config.items())))
        if key not in made:
            made[key] = build_model(family, seed, vocab_size, **config)
        return made[key]

    return make


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> GenARM:
    """A base with the ARM "a" at weight 0.5 and the ARM "b" at weight -1."""
    from genarm_fast import ARM, GenARM

    arms = [ARM(tiny_model(seed=1), name="a", weight=0.5), ARM(tiny_model(seed=2), name="b", weight=-1.0)]
    return GenARM.from_pretrained(tiny_model(), arms, tokenizer=tokenizer)


@pytest.fixture(scope="session", autouse=True)  # before any module's models are made
def undrafted() -> Iterator[None]:
    """Switch speculation off unless a test asks for it. With "auto", timing decides how tokens are grouped, and the
    grouping changes how float32 products round."""
    from genarm_fast import GenARM

    with pytest.MonkeyPatch.context() as patch:
        for function in (GenARM.__init__, GenARM.from_pretrained.__func__):
            patch.setitem(function.__kwdefaults__, "speculation", "off")
        yield


@pytest.fixture
def neighbourly_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault: the tokens that a row draws depend on whether other rows are in the batch."""
    from genarm_fast.engine.step_tensors import State

    positions = State.response_positions

    def shifted(self: State, width: int) -> torch.Tensor:
        return positions(self, width) + (len(self.lengths) > 1)

    monkeypatch.setattr(State, "response_positions", shifted)


@pytest.fixture(scope="session", autouse=True)  # before any module's models are made
def on_the_cpu() -> Iterator[None]:
    """Hide the GPU from code that looks for one, so that tests run on the CPU unless they name a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def gpu_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests marked `gpu` see the machine's GPU, and hide it from processes that other tests start."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("gpu"):
            patch.setattr(torch.cuda, "is_available", CUDA_IS_AVAILABLE)
            patch.setattr(torch.accelerator, "is_available", ACCELERATOR_IS_AVAILABLE)
        else:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Release every model that `genarm_fast.generate` keeps, before and after the test."""
    from genarm_fast import release

    release()
    yield
    release()
