"""The weights that a request asks for, in the forms that vLLM passes on."""

from __future__ import annotations

import pytest

from genarm_fast.integrations.vllm.request_weights import requested_weights
from genarm_fast.integrations.vllm.served import Served, ServedARM

SERVED = Served((ServedARM("kind", "a", 0.5), ServedARM("terse.2", "b", -1.0)), weight_range=(-2.0, 2.0))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (None, (0.5, -1.0)),
        ({}, (0.5, -1.0)),
        ({"arm_weights": None}, (0.5, -1.0)),
        ({"arm_weights": [0, 2]}, (0.0, 2.0)),
        ({"arm_weights": 1.5}, (1.5, 1.5)),
        ({"arm_weights": {"kind": 0.0}}, (0.0, -1.0)),
        ({"arm_weights.terse.2": 0.25}, (0.5, 0.25)),
        ({"arm_reward": "kind"}, (1.0, 0.0)),
        ({"arm_weights.kind": -1, "arm_weights.terse.2": 1, "session_id": "x"}, (-1.0, 1.0)),
    ],
)
def test_by_position_by_name_and_by_default(extra, expected):
    assert requested_weights(extra, SERVED) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"arm_weights": [1.0]}, "expected 2 numbers, one per ARM, got 1"),
        ({"arm_weights": []}, "expected 2 numbers"),
        ({"arm_weights": "0.5"}, "arm_weights: .*expected a number"),
        ({"arm_weights": [1.0, "x"]}, "expected finite numbers, got 'x'"),
        ({"arm_weights": [1.0, True]}, "expected finite numbers, got True"),
        ({"arm_weights": float("nan")}, "expected finite numbers"),
        ({"arm_weights.nobody": 1.0}, "'nobody': expected 'kind', 'terse.2'"),
        ({"arm_weights": [1, 1], "arm_weights.kind": 1}, "by position or by name, not both"),
        ({"arm_weight": [1, 1]}, "arm_weight: expected arm_weights, or arm_weights.NAME"),
        ({"arm_weights_kind": 1}, "arm_weights_kind: expected arm_weights"),
        ({"arm_weights": [1.0, 2.5]}, "terse.2=2.5: expected -2..2, the range of this server"),
        ({"arm_weights": [[1.0, 0.5], 1.0]}, r"a number for each ARM \(kind, terse.2\), not one for each token"),
        ({"arm_weights.kind": [1.0, 2.0]}, "not one for each token"),
        ({"arm_reward": "nobody"}, "arm_reward='nobody': expected the name of an ARM, one of kind, terse.2"),
        ({"arm_rewards": "kind"}, "arm_rewards: expected arm_reward, with the name of an ARM: kind, terse.2"),
        ({"arm_reward": 1}, "arm_reward=1: expected the name of an ARM"),
        ({"arm_reward": "kind", "arm_weights": [1, 1]}, "arm_reward, arm_weights: expected one of them"),
        ({"arm_weights.kind": -2.5}, "kind=-2.5: expected -2..2"),
    ],
)
def test_wrong_ones_say_what_was_expected(extra, message):
    with pytest.raises(ValueError, match=message):
        requested_weights(extra, SERVED)
