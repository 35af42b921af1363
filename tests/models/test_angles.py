"""Angles that are looked up equal those that transformers computes, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from genarm_fast.models import angles
from genarm_fast.models.angles import Angles

CONTEXT = 64  # tokens the model was trained for
SHORT, LONG = [1.0] * 8, [3.0] * 8
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": CONTEXT,
    },
}


def rotary(kind: str) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=CONTEXT, rope_parameters=parameters
    )
    return LlamaRotaryEmbedding(config)


def same(found: Angles, expected: LlamaRotaryEmbedding, dtype: torch.dtype) -> bool:
    """Compare over texts that grow past the trained context and begin again: in blocks, all at once, and at random
    positions."""
    hidden = torch.zeros(1, dtype=dtype)
    random = torch.randint(0, 600, (3, 5), generator=torch.Generator().manual_seed(0))
    blocks = [torch.arange(start, start + 50)[None] for start in (0, 40, 90, 500, 0)]
    for positions in (*blocks, torch.arange(1100)[None], random, torch.tensor([[7]])):
        ours = found(hidden, positions, int(positions.max()) + 1)
        theirs = expected(hidden, position_ids=positions)
        if not all(map(torch.equal, ours, theirs)):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROPES)
def test_bits(kind, dtype):
    found = Angles(rotary(kind))
    assert same(found, rotary(kind), dtype)
    assert found.fixed == (found.table is not None) == (kind not in ("dynamic", "longrope"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_table_of_changing_frequencies_would_be_seen(kind):
    found = Angles(rotary(kind))
    found.fixed = True
    assert not same(found, rotary(kind), torch.float32)


def test_tables_grow_to_a_limit(monkeypatch):
    monkeypatch.setattr(angles, "FIRST_TABLE_POSITIONS", 4)
    monkeypatch.setattr(angles, "MAX_TABLE_POSITIONS", 16)
    found, hidden, sizes = Angles(rotary("default")), torch.zeros(1), []
    for bound in (3, 4, 5, 9, 2, 16, 17):
        positions = torch.tensor([[bound - 1, 0]])
        ours = found(hidden, positions, bound)
        assert all(map(torch.equal, ours, rotary("default")(hidden, position_ids=positions)))
        sizes.append(len(found.table[0]))
    assert sizes == [4, 4, 8, 16, 16, 16, 16]


def test_what_does_not_name_its_type_is_computed():
    """Rotary embeddings of other families have a type for each kind of layer, or none."""
    own = rotary("default")
    found = Angles(partial(own.forward))
    assert not found.fixed
    assert same(found, own, torch.float32)
