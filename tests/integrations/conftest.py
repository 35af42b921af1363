from __future__ import annotations

import pytest
from guided_rows import PAD
from tiny_models import build_tokenizer
from transformers import PreTrainedModel

from genarm_fast import ARM
from genarm_fast.integrations.transformers import GenARMLogitsProcessor


@pytest.fixture(scope="module")
def padded_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.pad_token_id = PAD
    return tokenizer


@pytest.fixture
def base(tiny_model) -> PreTrainedModel:
    base = tiny_model()
    base.generation_config.pad_token_id = PAD
    return base


@pytest.fixture
def guide(base, tiny_model, padded_tokenizer) -> GenARMLogitsProcessor:
    arms = [ARM(tiny_model(seed=1), weight=0.5), ARM(tiny_model(seed=2), weight=-1.0)]
    return GenARMLogitsProcessor(base, arms, tokenizer=padded_tokenizer)
