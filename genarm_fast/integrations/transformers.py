"""ARMs inside Hugging Face's `model.generate`: `custom_generate=guided(arms)`, or a logits processor.

The processor gives

    scores = log_softmax(base scores) + Σ_i w_i · log_softmax(ARM_i logits)            arXiv 2410.08193, eq. 6

over the common vocabulary, in float32. Hugging Face's temperature, top-k, top-p and min-p are applied after it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerBase

from genarm_fast.device.base import on_host
from genarm_fast.integrations.custom_generate import guided
from genarm_fast.models.arm import ARM, as_arms
from genarm_fast.models.loader import load_members
from genarm_fast.models.member import Member
from genarm_fast.models.vocabulary import common_vocabulary
from genarm_fast.params import check_weights, weights_per_arm
from genarm_fast.text.given import as_prompts
from genarm_fast.text.prompts import encode_prompt, left_padded
from genarm_fast.utils.checks import check_integer, shown

__all__ = ["GenARMLogitsProcessor", "guided"]
PADDING = -1  # stands for a masked token


class GenARMLogitsProcessor(LogitsProcessor):
    """Guides `base.generate(..., logits_processor=[this])`, by sampling, greedily, with beams or an assistant.

    Every ARM has its own key-value cache and gets only the tokens that it has not read. Rows are compared with those of
    the previous call. So reordered rows, rejected drafts and new prompts are recognised. By default the ARMs read the
    rows of `generate` without their leading pad tokens. After `start` they read the prompts in their own templates. The
    cache of a prompt serves its own texts and later prompts that continue them, until `release` frees it.

    Args:
        base: the model that generates; its adapters share its weights. Never modified.
        arms: one or several hub ids, folders, loaded models or `ARM`s.
        weights: one for each ARM, or a number for all; default: the ARMs' own. May be set between any two tokens.
        tokenizer: the base's tokenizer; default: the one in its folder.
        pad_token_id: the token that rows are padded with on their left; default: the tokenizer's.
        dtype, device: dtype and device of ARMs that are not loaded yet; default: the dtype of their checkpoint, the
            device of the base.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `GenARM.from_pretrained`.
    """

    def __init__(
        self,
        base: nn.Module,
        arms: str | os.PathLike[str] | nn.Module | ARM | Sequence[str | os.PathLike[str] | nn.Module | ARM],
        *,
        weights: float | Sequence[float] | Mapping[str, float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(base, nn.Module):
            raise TypeError(f"base={shown(base)}: expected the loaded model that generates")
        specs = as_arms(arms)
        if weights is not None:
            check_weights(weights, len(specs))
        if pad_token_id is not None:
            pad_token_id = check_integer("pad_token_id", pad_token_id, "a token id >= 0", 0)
        self._pad_token_id = pad_token_id
        device = next(base.parameters()).device if device is None else device
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": None, "quantization_config": None}
        with on_host():
            self.members, _ = load_members(base, specs, tokenizer=tokenizer, **loading)
        self._weights = tuple(arm.weight for arm in self.members[1:])
        if weights is not None:
            self.weights = weights
        self.vocab_size = common_vocabulary(self.members)
        self._readers = [_Reader(member) for member in self.members[1:]]
        self._prompts: list[tuple[Tensor, Tensor]] | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        return self._weights

    @weights.setter
    def weights(self, weights: float | Sequence[float] | Mapping[str, float]) -> None:
        new = weights_per_arm(weights, [arm.name for arm in self.members[1:]], self._weights)
        if any(isinstance(weight, tuple) for weight in new):
            raise ValueError(f"weights={weights!r:.200}: expected a number per ARM; guided() takes one for each token")
        self._weights = tuple(map(float, new))  # type: ignore[arg-type]

    @property
    def pad_token_id(self) -> int | None:
        """The pad token id that was given, else the tokenizer's, which may be set later."""
        return self.members[0].tokenizer.pad_token_id if self._pad_token_id is None else self._pad_token_id

    def start(self, prompts: Any) -> dict[str, Tensor]:
        """Set the prompts of the next `generate`: `base.generate(**processor.start(prompts), ...)`.

        Args:
            prompts: as in `GenARM.generate`: each member reads them in its own template.

        Returns:
            The base's input_ids and attention_mask, int64 [prompts, longest], padded on the left.

        Raises:
            TypeError, ValueError: naming the prompt and what was expected.
        """
        parsed = as_prompts(prompts)
        ids = [[encode_prompt(member, p, i, self.vocab_size) for i, p in enumerate(parsed)] for member in self.members]
        with on_host():
            self._prompts = [left_padded(lists, self.pad_token_id or 0) for lists in ids]
        device = self.members[0].device
        return dict(zip(("input_ids", "attention_mask"), (each.to(device) for each in self._prompts[0])))

    def release(self) -> None:
        """Free the caches and forget the prompts of `start`."""
        self._prompts = None
        for reader in self._readers:
            reader.forget()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return guided scores, float32 [R, V], not normalised.

        input_ids: int64 [R, t]. scores: the base's logits or log-probabilities [R, V]. The result is -inf where the
        base or an ARM of non-zero weight has -inf, and beyond the common vocabulary.

        Raises:
            ValueError: rows that the ARMs cannot read as the base does; a row without any token left; NaN.
        """
        if scores.shape[-1] < self.vocab_size or scores.shape[0] != input_ids.shape[0] or not input_ids.shape[1]:
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)}, scores of shape {tuple(scores.shape)}: expected [R, t]"
                f" with t >= 1 and [R, V] with V >= {self.vocab_size}, the common vocabulary"
            )
        with on_host():
            return self._guided(input_ids, scores)

    def _guided(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self._padded_rows(input_ids) if self._prompts is None else self._started_rows(input_ids, self._prompts)
        total = scores[:, : self.vocab_size].float().log_softmax(-1)
        masked = total == -torch.inf
        for reader, weight, (tokens, mask) in zip(self._readers, self._weights, rows):
            if weight:
                logits = reader.logits(tokens, mask, self.pad_token_id)
                logprobs = logits[:, : self.vocab_size].to(total.device, torch.float32).log_softmax(-1)
                masked |= logprobs == -torch.inf
                total += weight * logprobs
        total = total.masked_fill(masked, -torch.inf)
        if not bool((total.amax(-1) > -torch.inf).all()):  # also true for NaN
            raise ValueError(
                "scores of the base and its ARMs: expected no NaN, and in every row a token that none masks"
            )
        return nn.functional.pad(total, (0, scores.shape[-1] - self.vocab_size), value=-torch.inf)

    def _padded_rows(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return tokens and mask for each ARM, found by the pad tokens: `generate` doesn't pass its mask on."""
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if self.pad_token_id is not None:
            mask = (input_ids == self.pad_token_id).cumprod(-1) == 0
            if not bool(mask[:, 0].any()):
                raise ValueError(
                    f"input_ids: every row begins with pad_token_id={self.pad_token_id}, as padding or in the prompt:"
                    " expected a row that doesn't, or prompts given to start()"
                )
        return [(input_ids, mask)] * len(self._readers)

    def _started_rows(self, input_ids: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        repeats, rest = divmod(len(input_ids), len(prompts[0][0]))
        base, *arms = [[each.repeat_interleave(repeats, 0) for each in pair] for pair in prompts]
        length = base[0].shape[1]
        if rest or not torch.equal(input_ids[:, :length].cpu(), base[0]):
            raise ValueError(
                "input_ids: expected rows that begin with the prompts of the last start(): call it before each generate"
            )
        response = input_ids[:, length:]
        read = torch.ones_like(response, dtype=torch.bool)
        return [
            (torch.cat([ids.to(response), response], -1), torch.cat([mask.to(read), read], -1)) for ids, mask in arms
        ]


class _Reader:
    """An ARM, with a cache of the rows that it read last."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.forget()

    def forget(self) -> None:
        self.rows = torch.empty(0, 0, dtype=torch.long)
        self.prompt = 1  # number of tokens of each row in the first call
        # Made without the config: a sliding window that has dropped a token can't be rolled back.
        self.cache = DynamicCache()

    def logits(self, tokens: Tensor, mask: Tensor, pad_token_id: int | None) -> Tensor:
        """Return the logits [R, V] of the token after each row.

        tokens: int64 [R, t]. mask: bool [R, t], False for padding on the left.
        """
        tokens = self._readable(tokens.to(self.member.device), mask.to(self.member.device), pad_token_id)
        rows, prompt, cache = self.rows, self.prompt, self.cache
        self.forget()  # the state stays empty if the forward fails
        parents, kept = parents_of(tokens, rows)
        # This is another generation, and the ARM may have been trained in between.
        if kept < prompt:
            prompt, kept, cache = tokens.shape[1], 0, self.cache
        else:
            if parents != list(range(len(rows))):
                cache.batch_select_indices(torch.tensor(parents))
            if kept < rows.shape[1]:
                cache.crop(kept - rows.shape[1])
        mask = tokens != PADDING
        logits = self.member.model(
            input_ids=tokens[:, kept:].clamp_min(0),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, kept:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.rows, self.prompt, self.cache = tokens, prompt, cache
        return logits[:, -1]

    def _readable(self, tokens: Tensor, mask: Tensor, pad_token_id: int | None) -> Tensor:
        name, width, context = self.member.name, self.member.vocab_size, self.member.context
        longest = int(mask.sum(-1).max())
        if context is not None and longest > context:
            raise ValueError(f"input_ids: {longest} tokens for {name}: expected at most {context}, its context")
        tokens = tokens.masked_fill(~mask, PADDING)
        # `generate` appends this token to rows that have ended.
        if pad_token_id is not None and pad_token_id >= width:
            tokens = tokens.masked_fill(tokens == pad_token_id, 0)
        if int(tokens.max()) >= width:
            raise ValueError(
                f"input_ids: token id {int(tokens.max())}: expected less than {width}, {name}'s vocabulary"
            )
        return tokens


def parents_of(tokens: Tensor, rows: Tensor) -> tuple[list[int], int]:
    """Find, for each sequence of tokens [R, t], its parent: the row of [R', t'] with the longest common beginning.

    Returns:
        The parents, and the number of tokens that every sequence has in common with its parent: at most t - 1, since
        the last token has to be fed.
    """
    width = min(tokens.shape[1] - 1, rows.shape[1])
    tokens, rows = tokens[:, :width], rows[:, :width]
    if tokens.shape == rows.shape and torch.equal(tokens, rows):
        return list(range(len(rows))), width
    if not rows.numel():
        return [], 0
    common = torch.stack([(row == rows).cumprod(-1).sum(-1) for row in tokens])
    most = common.max(-1)
    return most.indices.tolist(), int(most.values.min())
