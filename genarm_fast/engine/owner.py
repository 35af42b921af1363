"""The owner of an engine: the members, the engine and the thread for event loops that all calls of a model share."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import astuple
from threading import Lock
from typing import Any

from genarm_fast.device.base import on_host
from genarm_fast.engine.config import EngineConfig
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.engine_thread import EngineThread
from genarm_fast.engine.given import check_speculation
from genarm_fast.engine.requests import RequestMaker
from genarm_fast.engine.selfcheck import check_models
from genarm_fast.engine.sequence import Request, Sequence
from genarm_fast.engine.warm_up import warm_up as warm_up_engine
from genarm_fast.models.member import Member
from genarm_fast.models.quantized import Quantized
from genarm_fast.models.vocabulary import common_vocabulary, end_of_sequence
from genarm_fast.params import AnyWeights, SamplingParams, Weight
from genarm_fast.speculation.config import Speculation, as_speculation
from genarm_fast.speculation.policy import Tuners

_owners: weakref.WeakSet[EngineOwner] = weakref.WeakSet()


class EngineOwner:
    """Members that decode together, and their engine, which the first call makes. Attributes are those of `GenARM`."""

    def __init__(
        self,
        members: Many[Member],
        *,
        max_batch_size: int = 16,
        cache_bytes: int | None = None,
        max_step_ms: float | None = None,
        speculation: str | Speculation = "auto",
        draft_model: Member | None = None,
    ) -> None:
        config = EngineConfig(max_batch_size, cache_bytes, max_step_ms)
        self.max_batch_size, self.cache_bytes, self.max_step_ms = astuple(config)
        self.members = list(members)
        self.base, self.arms = self.members[0], self.members[1:]
        self.tokenizer = self.base.tokenizer
        self.draft_model = draft_model
        self.speculation = as_speculation(speculation)
        self.tuners = Tuners()
        self._engine: Engine | None = None
        self._thread: EngineThread | None = None
        self._creation_lock = Lock()  # held while the engine or the thread is made
        _owners.add(self)
        self.vocab_size = common_vocabulary(self.members)
        if draft_model is not None and common_vocabulary([*self.members, draft_model]) < self.vocab_size:
            raise ValueError(
                f"draft_model: expected a vocabulary of at least {self.vocab_size} tokens, as the members have"
            )
        self.eos_token_ids = end_of_sequence(self.base, self.vocab_size)
        self._requests = RequestMaker(self.members, self.vocab_size, self.eos_token_ids, draft_model)
        check_models(self.members, draft_model)

    @property
    def forwards(self) -> dict[str, str]:
        """Which forward runs each member, genarm_fast's or that of transformers, and why; by the member's name."""
        return {member.name: member.runs_by for member in self.members}

    @property
    def quantized(self) -> dict[str, Quantized | None]:
        """What `quantization` did to each member, by the member's name and matrix by matrix; None if nothing."""
        return {member.name: getattr(member.model, "quantized", None) for member in self.members}

    @property
    def arm_names(self) -> list[str]:
        return [arm.name for arm in self.arms]

    def prepare(
        self, prompts: Any, sampling_params: SamplingParams | Many[SamplingParams] | None = None, **overrides: Any
    ) -> list[Request]:
        """Return checked and tokenised requests, one per prompt. Arguments and errors as in `generate`."""
        return self._requests.make(prompts, sampling_params, **overrides)

    def expand_weights(self, weights: AnyWeights | None) -> tuple[Weight, ...]:
        """Return one weight per ARM, each a number or one for each token; None takes the ARMs' defaults.

        Raises the same errors as `SamplingParams`.
        """
        return self._requests.expand_weights(weights)

    def warm_up(
        self,
        *,
        batch_sizes: int | Many[int] = 1,
        prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        speculation: str | Speculation | None = None,
    ) -> None:
        """Do what a first request would wait for otherwise: self-check, caches, memory pages, graphs, kernels.

        Args:
            batch_sizes: how many requests will be decoded together; one number or several.
            prompt_tokens, max_new_tokens: tokens of the longest prompt and of the longest response. None: 128 each, or
                fewer if the smallest context of a member is too small.
            speculation: the setting that requests will ask for, if not the model's.

        Raises:
            TypeError, ValueError: an argument is wrong, before any work; or a model fails the self-check.
            MemoryError: the caches for such requests take more than the free memory, or than cache_bytes.
            RuntimeError: requests are running.
        """
        plan = self._speculation(speculation)
        with on_host():
            warm_up_engine(self.engine(), self.prepare, plan, batch_sizes, prompt_tokens, max_new_tokens)

    def release(self) -> None:
        """Free the caches and graphs that calls leave for the next one.

        Calls leave at most as many bytes of caches as the weights take or 64 MB, unless `warm_up` made more.
        """
        if self._engine is not None:
            with self._engine.turns.take():
                self._engine.release()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the caches that calls have left for the next one."""
        return 0 if self._engine is None else self._engine.workspace.bytes

    @property
    def drafters(self) -> list[str]:
        """Names of drafters for `Speculation`: members, unless all share one forward, n-grams, and the draft model."""
        names = (name for drafter in self.engine().drafters for name in drafter.names)
        return sorted(names, key=lambda name: name != "base")

    def engine(self) -> Engine:
        """Return the engine that all calls of all threads share; a new one for a call from inside a step."""
        config = self._config()
        with self._creation_lock:
            if self._engine is None:
                self._engine = self._new_engine(config)
        if self._engine.turns.is_mine:  # a logits processor calls `generate`
            return self._new_engine(config)
        self._engine.config = config
        return self._engine

    def _config(self) -> EngineConfig:
        return EngineConfig(self.max_batch_size, self.cache_bytes, self.max_step_ms)  # a user may have set attributes

    def _new_engine(self, config: EngineConfig) -> Engine:
        with on_host():
            return Engine(self.members, self.vocab_size, config, self.tuners, self.draft_model)

    def _decoding(
        self, prompts: Any, params: Any, speculation: Any, overrides: Mapping[str, Any], streamed: bool = False
    ) -> tuple[Engine, list[list[Sequence]]]:
        """Return the engine and new sequences, one list per prompt. Raises ValueError for n > 1 in a stream."""
        plan, requests = self._speculation(speculation), self.prepare(prompts, params, **overrides)
        if streamed and (n := max(request.params.n for request in requests)) != 1:
            raise ValueError(f"n={n}: expected 1 in a stream")
        return self.engine(), [request.sequences(self.tokenizer, plan) for request in requests]

    def _speculation(self, speculation: str | Speculation | None) -> Speculation:
        """Return the speculation setting of a call, or the model's for None. Raises ValueError for unknown drafters."""
        return check_speculation(self.speculation if speculation is None else speculation, self.drafters)

    def _engine_thread(self) -> EngineThread:
        with self._creation_lock:
            if self._thread is None:
                self._thread = EngineThread()
                weakref.finalize(self, self._thread.end).atexit = False
            return self._thread

    def _forked(self) -> None:
        """Make new locks in a forked process, which lacks the parent's other threads; and a new engine if in use.

        A stream of the thread that forked goes on in the old engine, unless that was in the middle of a step.
        """
        self._creation_lock, self.tuners.lock, self._thread = Lock(), Lock(), None
        if self._engine is not None and (self._engine.turns.forked() or self._engine.scheduler):
            self._engine = None


def _reset_owners_after_fork() -> None:
    for owner in list(_owners):
        owner._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_owners_after_fork)
