"""Requests from a caller's arguments: checked, and tokenised for every member, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from genarm_fast.engine.sequence import Request
from genarm_fast.models.member import Member
from genarm_fast.params import AnyWeights, SamplingParams, Weight, weights_per_arm
from genarm_fast.text.given import Prompt, as_prompts
from genarm_fast.text.prompts import check_context, check_ids, encode_prompt, special_stops

UNCHECKED_COMPLETIONS = 1024  # number of completions up to which the memory for their bookkeeping is not checked
SEQUENCE_BYTES = 8192  # bytes of the host's memory that a sequence takes before its first token
TOKEN_BYTES = 64  # bytes that each token takes in addition: its id, and its log-probability if asked for


@dataclass(frozen=True)
class RequestMaker:
    """Makes requests for these members, base first. All token ids in a request are below `vocab_size`."""

    members: Sequence[Member]
    vocab_size: int
    eos_token_ids: frozenset[int]
    draft_model: Member | None = None

    def make(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Any = None,
        chat_template_kwargs: Any = None,
        **overrides: Any,
    ) -> list[Request]:
        """Return one request per prompt, in order. Arguments as in `GenARM.generate`.

        Raises:
            TypeError, ValueError: naming the prompt, the argument and what was expected.
        """
        parsed = as_prompts(prompts, tools=tools, chat_template_kwargs=chat_template_kwargs)
        each = _one_per_prompt(sampling_params, len(parsed))
        if overrides:
            each = [params.override(**overrides) for params in each]
        _check_memory(each)
        return [self._request(index, prompt, params) for index, (prompt, params) in enumerate(zip(parsed, each))]

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        ids = [encode_prompt(member, prompt, index, self.vocab_size) for member in self.members]
        for member, token_ids in zip(self.members, ids):
            check_context(member, len(token_ids), params.max_new_tokens, index)
        if self.draft_model is not None:  # the draft model reads the base's prompt
            check_context(self.draft_model, len(ids[0]), params.max_new_tokens, index)
            check_ids(self.draft_model, ids[0], index)
            ids.append(ids[0])
        try:
            self._check_tokens(params)
            weights = self.expand_weights(params.weights)
            special = special_stops(self.members[0].tokenizer, params.stop)
            if special and max(special) >= self.vocab_size:
                stop = self.members[0].tokenizer.convert_ids_to_tokens(max(special))
                raise ValueError(f"stop={stop!r}: token id {max(special)}: expected less than {self.vocab_size}")
            eos = frozenset() if params.ignore_eos else self.eos_token_ids
            stop_ids = frozenset(params.stop_token_ids) | special | eos
            self._check_possible(params, stop_ids)
        except ValueError as error:
            raise ValueError(f"prompts[{index}]: {error}") from None
        arms = enumerate(self.members[1:], 1)
        as_base = frozenset(m for m, arm in arms if arm.model is self.members[0].model and ids[m] == ids[0])
        return Request(index, prompt, ids, params, weights, stop_ids, as_base)

    def _check_tokens(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids", "suppress_tokens"):
            for token in getattr(params, name) or ():
                if token >= self.vocab_size:
                    raise ValueError(f"{name}: token id {token}: expected less than {self.vocab_size}")
        if (params.logprobs or 0) > self.vocab_size:
            raise ValueError(f"logprobs={params.logprobs}: expected at most {self.vocab_size}, the vocabulary")

    def _check_possible(self, params: SamplingParams, stop_ids: frozenset[int]) -> None:
        """Raise ValueError if all tokens are ruled out, so that the first one could not be drawn."""
        ruled_out = {*params.suppress_tokens, *(t for t, b in (params.logit_bias or {}).items() if b == -inf)}
        if params.min_new_tokens:
            ruled_out |= stop_ids
        allowed = range(self.vocab_size) if params.allowed_token_ids is None else set(params.allowed_token_ids)
        if len(ruled_out) >= len(allowed) and ruled_out.issuperset(allowed):
            by = "allowed_token_ids, suppress_tokens, logit_bias and, before min_new_tokens, stop tokens"
            raise ValueError(f"{by}: expected a token that they leave possible")

    def expand_weights(self, weights: AnyWeights | None) -> tuple[Weight, ...]:
        """Return one weight per ARM, from None for the defaults, a number for all ARMs, a list, or numbers by name.

        A weight may be a tuple with a number for each token of the response.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
        """
        arms = self.members[1:]
        if weights is None:
            return tuple(arm.weight for arm in arms)
        return weights_per_arm(weights, [arm.name for arm in arms], [arm.weight for arm in arms])


def _one_per_prompt(params: Any, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    expected = f"expected a SamplingParams, or {count}, one per prompt"
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise TypeError(f"sampling_params={params!r:.200}: {expected}")
    if len(params) != count:
        raise ValueError(f"sampling_params: {expected}, got {len(params)}")
    return list(params)


def _check_memory(each: Sequence[SamplingParams]) -> None:
    """Raise ValueError if the completions of all prompts together take more than half of the free memory."""
    if sum(params.n for params in each) <= UNCHECKED_COMPLETIONS:
        return
    left = free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for index, params in enumerate(each):
        size = SEQUENCE_BYTES + TOKEN_BYTES * params.max_new_tokens
        left -= params.n * size
        if left < 0 and params.n > 1:
            most = max(free // size, 1)
            raise ValueError(
                f"prompts[{index}]: n={params.n}: expected at most {most}, for which there is memory, less those"
                " of other prompts"
            )
