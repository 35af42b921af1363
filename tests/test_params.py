"""Sampling parameters: every bad value is refused by name before any work."""

import json
import math

import numpy as np
import pytest
import torch

from genarm_fast.params import SamplingParams, check_weights

CIRCULAR: list = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("weights", [1.0, math.nan], ValueError),
        ("weights", math.inf, ValueError),
        ("weights", "1", TypeError),
        ("weights", [True], ValueError),
        ("temperature", -0.1, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.01, ValueError),
        ("min_p", -0.1, ValueError),
        ("max_new_tokens", 0, ValueError),
        ("min_new_tokens", 129, ValueError),
        ("stop", [""], ValueError),
        ("stop", [3], ValueError),
        ("stop_token_ids", [-1], ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("n", 0, ValueError),
        ("logprobs", -1, ValueError),
        ("logprobs", True, TypeError),
        ("repetition_penalty", 0.0, ValueError),
        ("logit_bias", {0: math.inf}, ValueError),
        ("logit_bias", {"a": 1.0}, TypeError),
        ("logits_processors", [1], TypeError),
        ("logits_processors", print, TypeError),
        ("logit_bias", [1], TypeError),
        ("logit_bias", {0: 1e39}, ValueError),  # infinite in float32
        ("weights", 1e39, ValueError),
        ("temperature", 10**400, ValueError),
        ("stop_token_ids", 5, TypeError),
        ("stop_token_ids", "12", TypeError),
        ("ignore_eos", "no", TypeError),
        ("weights", b"1", TypeError),
        ("stop", "a\ud800", ValueError),  # a text never contains a lone surrogate, so the stop string could not fire
        ("stop", ["b", "\udc00"], ValueError),
        ("rewards", 1, TypeError),
        ("weights", 3e38, ValueError),  # infinite in float32 once it is multiplied by a logit
        ("base_weight", -3e38, ValueError),
        ("temperature", 3e38, ValueError),
        ("frequency_penalty", -3e38, ValueError),
        ("presence_penalty", 3e38, ValueError),
        ("repetition_penalty", 3e38, ValueError),
        ("repetition_penalty", 1e-46, ValueError),  # 0 in float32, and 0 times -inf is NaN
        ("logit_bias", {5: 3e38}, ValueError),
        ("logit_bias", {5: 10**400}, ValueError),
        ("weights", [[[1.0]], 1.0], ValueError),
        ("weights", [[[1.0, 1.0], 2.0], 1.0], ValueError),
        ("weights", [[], 1.0], ValueError),
        ("weights", {"a": [[1.0]]}, ValueError),
        ("weights", CIRCULAR, ValueError),
        ("max_time", math.inf, ValueError),
        ("max_time", 0, ValueError),
        ("priority", 2**31 + 1, ValueError),
        ("priority", 1.0, TypeError),
        ("priority", True, TypeError),
    ],
)
def test_bad_values_are_named(name, value, error):
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


def test_good_values_are_normalised():
    params = SamplingParams(weights=[1, -2], stop="end", stop_token_ids=[3], seed=2**64 - 1, logit_bias={5: -math.inf})
    assert params.weights == (1.0, -2.0)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {5: -math.inf}
    changed = params.override(temperature=0)
    assert (changed.temperature, changed.weights, params.temperature) == (0, (1.0, -2.0), 1.0)


def test_numbers_of_numpy_and_torch_become_plain_ones():
    """numpy's and torch's own numbers overflow, and JSON cannot store them."""
    params = SamplingParams(
        seed=np.uint64(2**64 - 1),
        n=np.int32(2),
        temperature=np.float32(0.5),
        weights=np.float32([1, 2]),
        stop_token_ids=torch.tensor([3]),
        logit_bias={np.int64(5): np.float32(1)},
    )
    values = (params.seed, params.n, params.temperature, params.weights, params.stop_token_ids, params.logit_bias)
    assert json.loads(json.dumps(values)) == [2**64 - 1, 2, 0.5, [1.0, 2.0], [3], {"5": 1.0}]


def test_unknown_override_is_refused():
    with pytest.raises(TypeError, match="'temprature': expected one of weights, base_weight, temperature"):
        SamplingParams().override(temprature=1)


def test_weights_are_counted():
    assert check_weights(2, 3) == 2.0
    assert check_weights([1, 2], 2) == (1.0, 2.0)
    with pytest.raises(ValueError, match="expected 3 numbers, one per ARM, got 2"):
        check_weights([1, 2], 3)
    with pytest.raises(ValueError, match="expected 1 number, one per ARM, got 2"):
        check_weights([1, 2], 1)


def test_none_is_the_default_of_every_parameter():
    assert SamplingParams(**dict.fromkeys(SamplingParams.__slots__)) == SamplingParams()
    assert SamplingParams(top_k=5, stop="a").override(top_k=None, stop=None) == SamplingParams()


def test_allowed_tokens_that_are_all_ruled_out():
    """The values are refused before any work, not at the first token."""
    for banned in ({"suppress_tokens": [5, 6]}, {"suppress_tokens": [5], "logit_bias": {6: -math.inf}}):
        with pytest.raises(ValueError, match=r"allowed_token_ids=\(5, 6\): expected one that suppress_tokens and"):
            SamplingParams(allowed_token_ids=[5, 6], **banned)
    SamplingParams(allowed_token_ids=[5, 6, 7], suppress_tokens=[5], logit_bias={6: -math.inf, 7: -1e30})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": 3e38}, r"weights=3e\+38: expected finite numbers, of at most 1e\+30 in size, got 3e\+38"),
        ({"temperature": 1e39}, r"temperature=1e\+39: expected a finite number >= 0, of at most 1e\+30 in size"),
        ({"temperature": math.nan}, "temperature=nan: expected a finite number >= 0$"),
        ({"logit_bias": {5: 1e31}}, r"logit_bias\[5\]=1e\+31: expected a finite number or -inf, of at most 1e\+30"),
        ({"max_time": math.inf}, "max_time=inf: expected finite seconds > 0"),
        ({"priority": 2**40}, r"priority=1099511627776: expected an integer in -2\*\*31..2\*\*31"),
        # Python cannot print an integer this long.
        ({"temperature": 1 << 20_000}, "temperature=<int>: expected a finite number >= 0"),
    ],
)
def test_messages_say_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


@pytest.mark.parametrize("name", ["weights", "stop", "stop_token_ids", "allowed_token_ids", "logit_bias", "seed"])
def test_messages_are_short(name):
    for value in ("x" * 10**6, [None] * 10**5, 10**4000, {"x" * 10**5: None}):
        with pytest.raises((TypeError, ValueError)) as caught:
            SamplingParams(**{name: value if name != "stop" else [value, ""]})
        assert name in str(caught.value)
        assert len(str(caught.value)) < 400
