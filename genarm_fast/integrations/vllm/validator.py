"""Refuse wrong weights where a request enters, with HTTP 400, so that they never reach the engine.

vLLM's validator is a classmethod that sees no configuration, and a string in the configuration names it. The served
ARMs are therefore part of that name, which `__getattr__` of this module reads. Several engines in one process do not
mix.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, ClassVar

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from genarm_fast.integrations.vllm.request_weights import REWARD_KEY, requested_weights, rewarding
from genarm_fast.integrations.vllm.served import Served

PREFIX = "Weights_"


def validator_name(served: Served) -> str:
    """Return `module:class` of the validator for these ARMs, as vLLM's `logits_processors` takes it."""
    text = json.dumps(served.overrides(), sort_keys=True)
    return f"{__name__}:{PREFIX}{text.encode().hex()}"


class RequestWeights(LogitsProcessor):
    """A validator of requests' weights. It changes no logits, since the weights act in the model."""

    served: ClassVar[Served]

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        requested_weights(sampling_params.extra_args, cls.served)
        if rewarding(sampling_params.extra_args, cls.served) is not None and sampling_params.max_tokens != 1:
            raise ValueError(
                f"{REWARD_KEY}, max_tokens={sampling_params.max_tokens}: expected 1, since such a request scores its"
                " prompt; what an ARM writes alone is outside of the server's range of weights"
            )

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False  # vLLM's sampler may take its short way if no logits change

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


@cache
def _validator(name: str) -> type[RequestWeights]:
    served = Served.of(json.loads(bytes.fromhex(name.removeprefix(PREFIX))))
    return type(name, (RequestWeights,), {"served": served, "__module__": __name__})


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _validator(name)
