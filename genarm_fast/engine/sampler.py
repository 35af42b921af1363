"""The targets of a round: the kernel for plain rows, adjusted scores for rows with penalties, bias or processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genarm_fast.device.base import Device, Stream
from genarm_fast.engine.sequence import Draw, Row
from genarm_fast.kernels import GuidedSample, guided_sample, seed_tensor
from genarm_fast.kernels.guided_sample.reference import ALL_MASKED, combine, member_logprob
from genarm_fast.models.member import Member
from genarm_fast.speculation.drafter import Drafts


class RowTensors(NamedTuple):
    """What `guided_sample` takes for some rows, [R]; weights [R, m] of the ARMs that run."""

    weights: Tensor
    parameters: dict[str, Tensor]
    logprobs: bool
    top_logprobs: int

    @classmethod
    def of(
        cls, rows: Sequence[Row], arms: Sequence[int], vocab_size: int, upload: Callable[[Tensor], Tensor]
    ) -> RowTensors:
        params = [row.request.params for row in rows]
        weights = [[row.weights[arm] for arm in arms] for row in rows]
        parameters = {
            "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float32),
            "top_k": torch.tensor([min(p.top_k, vocab_size) for p in params]),
            "top_p": torch.tensor([p.top_p for p in params], dtype=torch.float32),
            "min_p": torch.tensor([p.min_p for p in params], dtype=torch.float32),
            "seeds": seed_tensor([row.seed for row in rows]),
        }
        return cls(
            upload(torch.tensor(weights, dtype=torch.float32)),
            {name: upload(values) for name, values in parameters.items()},
            any(row.wants_logprobs for row in rows),
            min(max(p.logprobs or 0 for p in params), vocab_size),
        )


class Sampler:
    """Draws for members that run: the base, then the ARMs with indices `arms`. All of it on `stream`."""

    def __init__(
        self, members: Sequence[Member], arms: Sequence[int], vocab_size: int, device: Device, stream: Stream
    ) -> None:
        self.names = [member.name for member in members]
        self.arms, self.vocab_size = arms, vocab_size
        self.device, self.stream = device, stream
        self._tensors: dict[Any, RowTensors] = {}

    def tensors(self, rows: Sequence[Row], stream: Stream | None = None) -> RowTensors:
        """For use on `stream`, else on its own. Made anew only when the rows or their weights change."""
        stream = self.stream if stream is None else stream
        key = stream, *((id(row), row.weights) for row in rows)
        if key not in self._tensors:
            if len(self._tensors) >= 8:
                self._tensors.clear()
            self._tensors[key] = RowTensors.of(
                rows, self.arms, self.vocab_size, partial(self.device.upload, stream=stream)
            )
        return self._tensors[key]

    def draw(self, rows: Sequence[Row], logits: Sequence[Tensor], drafts: Drafts) -> list[list[Draw]]:
        """The targets of every row, up to the first that differs from its draft.

        logits: one [R, q, V] per member; position j follows the j first of the row's drafts. A row that cannot be
        sampled gets its `error` set.
        """
        draws: list[list[Draw]] = [[] for _ in rows]
        plain = [i for i, row in enumerate(rows) if not adjusts(row)]
        if plain:
            chosen, members = self._subset(plain, rows, logits)
            result = self.sample(chosen, members, self.positions(chosen, 0, members[0].shape[1]))
            read = self.read(result)
            for i, settled in zip(plain, self.lines(chosen, read(), [drafts.tokens[i] for i in plain])):
                draws[i] = settled
        adjusted = [i for i, row in enumerate(rows) if adjusts(row)]
        for step in range(logits[0].shape[1]):  # one by one, so that processors only see what is settled
            if not adjusted:
                break
            chosen, members = self._subset(adjusted, rows, [each[:, step] for each in logits])
            result = self._sample_adjusted(chosen, members, [drafts.tokens[i][:step] for i in adjusted], step)
            for i, settled in zip(adjusted, self.lines(chosen, self.read(result)(), [()] * len(chosen))):
                draws[i] += settled
            adjusted = [
                i
                for i in adjusted
                if rows[i].error is None
                and step < len(drafts.tokens[i])
                and draws[i][-1].token == drafts.tokens[i][step]
            ]
        return draws

    def propose(
        self, rows: Sequence[Row], lanes: Sequence[Tensor], members: Sequence[int], positions: Tensor, stream: Stream
    ) -> Tensor:
        """A draft for every row, int64 [R, 1], from some members' logits [R, 1, V], with the noise of its target, whose
        positions [R, 1] in the response these are. Everything is on `stream`.

        Their weights are scaled to the sum of all members'. `members`: their places among those that run; others draft
        with weight 1.
        """
        tensors = self.tensors(rows, stream)
        weights = torch.cat([torch.ones_like(tensors.weights[:, :1]), tensors.weights], dim=1)
        total = weights.sum(1)
        parameters = dict(tensors.parameters)
        lanes = [lane[..., : self.vocab_size] for lane in lanes]
        if len(lanes) == 1:
            parameters["temperature"] = parameters["temperature"] / torch.where(total > 0, total, 1.0)
            base, weights = lanes[0], weights[:, :0]
        else:
            weights = weights[:, list(members)]
            own = weights.sum(1)
            weights = weights * torch.where((own > 0) & (total > 0), total / own, 1.0)[:, None]
            base = lanes[0].new_zeros(lanes[0].shape[-1]).expand(lanes[0].shape)
        arms = tuple(lanes) if weights.shape[1] else ()
        return guided_sample(base, arms, weights, positions=positions, **parameters).tokens

    def sample(self, rows: Sequence[Row], logits: Sequence[Tensor], positions: Tensor) -> GuidedSample:
        """Targets [R, q] from each member's logits [R, q, V]; without ARMs the base has combined scores already."""
        tensors = self.tensors(rows)
        base, *arms = (each[..., : self.vocab_size] for each in logits)
        return guided_sample(
            base,
            tuple(arms),
            tensors.weights[:, : len(arms)],
            positions=positions,
            return_logprobs=tensors.logprobs,
            top_logprobs=tensors.top_logprobs,
            **tensors.parameters,
        )

    def read(self, result: GuidedSample) -> Callable[[], GuidedSample]:
        """Begin to copy it to the host; call what is returned to wait for it."""
        fields = {name: field for name, field in result._asdict().items() if field is not None}
        read = self.device.read(list(fields.values()), self.stream)
        return lambda: result._replace(**dict(zip(fields, read())))

    def lines(self, rows: Sequence[Row], result: GuidedSample, drafts: Sequence[Sequence[int]]) -> list[list[Draw]]:
        """Results [R, q] on the host up to the first that was not drafted, as Python values; sets errors."""
        lines: list[list[Draw]] = []
        tokens, status = result.tokens.tolist(), result.status.tolist()
        for r, (row, draft) in enumerate(zip(rows, drafts)):
            count = 0
            while not row.ended and count < len(tokens[r]):
                if status[r][count]:
                    row.error = self._failure(status[r][count], len(row.tokens) + count)
                    break
                count += 1
                if count > len(draft) or tokens[r][count - 1] != draft[count - 1]:
                    break
            lines.append([Draw(token) for token in tokens[r][:count]])
            if row.wants_logprobs and result.logprobs is not None and result.member_logprobs is not None:
                members = result.member_logprobs[:, r, :count].T.tolist()
                for draw, logprob, member in zip(lines[r], result.logprobs[r].tolist(), members):
                    draw.logprob, draw.member_logprobs = logprob, member
            if row.request.params.logprobs and result.top_tokens is not None and result.top_logprobs is not None:
                top = row.request.params.logprobs
                best = zip(result.top_tokens[r, :count, :top].tolist(), result.top_logprobs[r, :count, :top].tolist())
                for draw, (ids, logprobs) in zip(lines[r], best):
                    draw.top = dict(zip(ids, logprobs))
        return lines

    def _upload(self, tensor: Tensor) -> Tensor:
        return self.device.upload(tensor, self.stream)

    def positions(self, rows: Sequence[Row], offset: int, width: int) -> Tensor:
        """In the response, int64 [R, width]."""
        return self._upload(torch.tensor([[len(row.tokens) + offset] for row in rows]) + torch.arange(width))

    def _subset(
        self, index: list[int], rows: Sequence[Row], logits: Sequence[Tensor]
    ) -> tuple[list[Row], list[Tensor]]:
        members = list(logits)
        if len(index) < len(rows):
            where = self._upload(torch.tensor(index))
            members = [member[where] for member in members]
        return [rows[i] for i in index], members

    def _sample_adjusted(
        self, rows: Sequence[Row], members: Sequence[Tensor], drafted: Sequence[Sequence[int]], offset: int
    ) -> GuidedSample:
        """Rows whose normalised combined log-probabilities are changed before the temperature. Members: [R, V]."""
        members = [each[:, : self.vocab_size] for each in members]
        combined, status = combine(members[0], members[1:], self.tensors(rows).weights)
        scores = combined.log_softmax(-1)
        for i, row in enumerate(rows):
            if status[i] == 0:
                try:
                    scores[i] = adjust(row, [*row.tokens, *drafted[i]], scores[i])
                except Exception as error:  # a caller's processor: this request fails, the others go on
                    row.error = error
        result = self.sample(rows, [scores[:, None]], self.positions(rows, offset, 1))
        failed = status[:, None]
        result = result._replace(status=torch.where(failed != 0, failed, result.status & ALL_MASKED))
        if result.logprobs is not None:
            logprobs = torch.stack([member_logprob(member, result.tokens[:, 0]) for member in members])
            result = result._replace(member_logprobs=logprobs[..., None])
        return result

    def _failure(self, status: int, position: int) -> ValueError:
        bad = [name for i, name in enumerate(self.names) if status >> (i + 1) & 1]
        what = f"NaN or +inf logits from {', '.join(bad)}" if bad else "every token is masked"
        return ValueError(f"{what} at token {position} of the response")


def adjusts(row: Row) -> bool:
    """Whether the next token's scores are changed between the combination and the temperature."""
    params = row.request.params
    return bool(
        params.repetition_penalty != 1.0
        or params.logit_bias
        or params.logits_processors
        or len(row.tokens) < params.min_new_tokens
    )


def adjust(row: Row, tokens: Sequence[int], scores: Tensor) -> Tensor:
    """Repetition penalty, logit bias, minimum length, processors, on log-probabilities float32 [V] after `tokens`."""
    params, vocab_size, device = row.request.params, scores.shape[-1], scores.device
    seen = torch.tensor([*row.request.token_ids[0], *tokens], device=device)
    if params.repetition_penalty != 1.0:
        known = seen[seen < vocab_size].unique()
        scores[known] *= params.repetition_penalty  # log-probabilities are never positive
    if params.logit_bias:
        index = torch.tensor(list(params.logit_bias), device=device)
        scores[index] += torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype, device=device)
    if len(tokens) < params.min_new_tokens:
        scores[[token for token in row.request.stop_ids if token < vocab_size]] = -torch.inf
    for processor in params.logits_processors:
        changed = processor(seen[None], scores[None])
        if not isinstance(changed, Tensor) or changed.shape != (1, vocab_size):
            shape = tuple(changed.shape) if isinstance(changed, Tensor) else changed
            raise ValueError(
                f"logits_processors: {processor!r} returned {shape!r}, expected scores of shape (1, {vocab_size})"
            )
        scores = changed[0].to(device=device, dtype=scores.dtype)
        if bool((scores.isnan() | (scores == torch.inf)).any()):
            raise ValueError(f"logits_processors: {processor!r} returned NaN or +inf, expected finite scores or -inf")
    return scores
