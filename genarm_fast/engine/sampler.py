"""The targets of a step: the tokens that plain decoding would give at the drafted positions and at the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.penalties import SeenTokens, adjusted_scores
from genarm_fast.engine.sequence import Reported, Sequence
from genarm_fast.kernels import GuidedSample, guided_sample
from genarm_fast.kernels.guided_sample.reference import ALL_MASKED, combine, member_logprob
from genarm_fast.models.member import Member
from genarm_fast.speculation.drafter import Drafts


class Sampler:
    """Draws targets from the members' logits, on the executor's main stream."""

    def __init__(self, executor: Executor, vocab_size: int) -> None:
        self.executor, self.vocab_size = executor, vocab_size
        self.seen = SeenTokens(vocab_size)

    def sample(self, batch: Batch, logits: list[Tensor], drafts: Drafts) -> GuidedSample:
        """Return targets [R, q] from each running member's logits [R, q, V]; position j follows the first j drafts.

        Sequences with penalties or processors need the host. They get targets up to the first one that differs from the
        draft, and -1 at the positions after it.
        """
        result = self.draw(logits, batch)
        rows = [r for r, sequence in enumerate(batch.sequences) if sequence.request.needs_host]
        members = [each[..., : self.vocab_size] for each in logits]
        return self._adjusted(batch, members, drafts, result, rows) if rows else result

    def draw(self, logits: list[Tensor], batch: Batch) -> GuidedSample:
        """Return targets from tensors on the device alone. Arguments as in `sample`."""
        sampling = batch.sampling(self.executor.main)
        members = [each[..., : self.vocab_size] for each in logits]
        positions = batch.response_positions(members[0].shape[1])
        weights = sampling.at(positions)
        given = {"positions": positions, "logit_bias": batch.bias(), **sampling.parameters}
        options: dict[str, Any] = {"return_logprobs": batch.wants_logprobs, "top_logprobs": batch.top_logprobs}
        if weights.ndim == 2:
            base, arms, weights = _weighed(members, weights, batch.plain_base)
            result = guided_sample(base, arms, weights, **given, **options)
        else:  # each position has its own weights, so each becomes a row of its own
            shape = positions.shape
            flat = [each.flatten(0, 1) for each in members]
            base, arms, weights = _weighed(flat, weights.flatten(0, 1), batch.plain_base)
            given = {name: _each_position(value, shape) for name, value in given.items()}
            result = _in_blocks(guided_sample(base, arms, weights, **given, **options), shape)
        if result.member_logprobs is not None:
            result = result._replace(member_logprobs=result.member_logprobs[: len(members)])
        return result

    def _adjusted(
        self, batch: Batch, members: list[Tensor], drafts: Drafts, result: GuidedSample, rows: list[int]
    ) -> GuidedSample:
        """Return `result` with these rows drawn again, position by position: processors see accepted tokens alone."""
        result = GuidedSample(*(None if field is None else field.clone() for field in result))
        result.tokens[self._index(rows)] = -1
        for position in range(members[0].shape[1]):
            drafted = [drafts.tokens[r][:position] if position else [] for r in rows]
            index = self._index(rows)
            drawn = self._draw_adjusted(batch, members, rows, index, drafted, position)
            for name, field in drawn._asdict().items():
                if field is not None:
                    whole = getattr(result, name)
                    if name == "member_logprobs":
                        whole[:, index, position] = field[..., 0]
                    else:
                        whole[index, position] = field[:, 0]
            tokens = drawn.tokens[:, 0].tolist()
            rows = [
                r
                for r, token in zip(rows, tokens)
                if batch.sequences[r].error is None
                and position < drafts.counts[r]
                and token == drafts.tokens[r][position]
            ]
            if not rows:
                break
        return result

    def _draw_adjusted(
        self,
        batch: Batch,
        members: list[Tensor],
        rows: list[int],
        index: Tensor,
        drafted: list[list[int]],
        position: int,
    ) -> GuidedSample:
        """Return tokens [R', 1] of some rows at one position, from scores that are adjusted before the temperature.

        rows, index: the R' rows, as a list and on the device. drafted: the tokens that precede the position.
        """
        main = self.executor.main
        sampling, bias = batch.sampling(main), batch.bias()
        logits = [member[index, position] for member in members]
        weights = batch.weights(main, batch.state.lengths[:, None] + position)[index]
        combined, status = combine(*_weighed(logits, weights, batch.plain_base))
        sequences = [batch.sequences[r] for r in rows]
        scores = adjusted_scores(
            sequences, drafted, combined.log_softmax(-1), None if bias is None else bias[index], self.seen
        )
        parameters: dict[str, Any] = {name: column[index] for name, column in sampling.parameters.items()}
        drawn = guided_sample(
            scores[:, None],
            (),
            weights[:, :0],
            positions=batch.state.lengths[index][:, None] + position,
            return_logprobs=batch.wants_logprobs,
            top_logprobs=batch.top_logprobs,
            **parameters,
        )
        failed = status[:, None]
        drawn = drawn._replace(status=torch.where(failed != 0, failed, drawn.status & ALL_MASKED))
        if drawn.logprobs is not None:
            logprobs = torch.stack([member_logprob(each, drawn.tokens[:, 0]) for each in logits])
            drawn = drawn._replace(member_logprobs=logprobs[..., None])
        return drawn

    def _index(self, rows: list[int]) -> Tensor:
        return self.executor.upload(torch.tensor(rows))


def _weighed(members: list[Tensor], weights: Tensor, plain_base: bool) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Return base, ARMs and ARM weights for `guided_sample`.

    members: logits [R, q, V] or [R, V], base first. weights: [R, 1 + m].

    The op gives the base the weight 1. For another weight b, the base is passed as a further ARM with weight b - 1.
    """
    base, *arms = members
    if plain_base:
        return base, tuple(arms), weights[:, 1:]
    return base, (*arms, base), torch.cat([weights[:, 1:], weights[:, :1] - 1], dim=-1)


def _each_position(value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return a parameter [R, ...] repeated for each of q positions, or one of shape [R, q] flattened: [R · q, ...]."""
    if value is None:
        return None
    return value.flatten() if value.shape == shape else value.repeat_interleave(shape[1], 0)


def _in_blocks(result: GuidedSample, shape: torch.Size) -> GuidedSample:
    """Return a result of R · q rows with its fields reshaped to [R, q, ...]."""
    fields = result._asdict()
    members = fields.pop("member_logprobs")
    blocks = {name: None if field is None else field.unflatten(0, shape) for name, field in fields.items()}
    return GuidedSample(**blocks, member_logprobs=None if members is None else members.unflatten(1, shape))


class HostSample:
    """The tokens that a step drew, on the host, in lists with a row for each sequence.

    tokens, status: [R, q]. accepted: number of accepted tokens in each row. drafts: each sequence's drafts. logprobs:
    the fields of a `GuidedSample` except tokens and status, by name. members: all members of the engine. active:
    indices of the members that ran.
    """

    def __init__(
        self,
        tokens: list[list[int]],
        status: list[list[int]],
        accepted: list[int],
        drafts: list[list[int]],
        logprobs: dict[str, Tensor],
        members: list[Member],
        active: tuple[int, ...],
    ) -> None:
        self.tokens, self.status, self.accepted, self.drafts = tokens, status, accepted, drafts
        self.logprobs, self.members, self.active = logprobs, members, active

    def of(self, r: int, sequence: Sequence) -> list[int]:
        """Return the accepted tokens of row r. If one of them could not be drawn, the sequence's `error` is set."""
        count, status = self.accepted[r], self.status[r]
        if any(status):
            failed = next((j for j in range(count) if status[j]), None)
            if failed is not None:
                sequence.error = self._failure(status[failed], len(sequence.tokens) + failed)
                count = failed
        return self.tokens[r][:count]

    def reported(self, r: int, sequence: Sequence, count: int) -> list[Reported]:
        """Return the log-probabilities that the sequence reports for the first `count` tokens of row r.

        By rounding, a certain token's log-probability may be 1.2e-7; here it is 0.
        """
        given, most = self.logprobs, sequence.request.params.logprobs
        members = given["member_logprobs"][:, r, :count].clamp_max(0.0).T.tolist()
        top: list[dict[int, float]] = [{} for _ in members]
        if most:
            ids, best = (given[name][r, :count, :most] for name in ("top_tokens", "top_logprobs"))
            top = [dict(zip(*pair)) for pair in zip(ids.tolist(), best.clamp_max(0.0).tolist())]
        lines = zip(given["logprobs"][r, :count].clamp_max(0.0).tolist(), members, top)
        return [Reported(own, self._of_all(sequence, ran), likely) for own, ran, likely in lines]

    def _of_all(self, sequence: Sequence, ran: list[float]) -> list[float]:
        """Return log-probabilities by the base and every ARM, from those of members that ran; 0 for the other ARMs."""
        known = dict(zip(self.active, ran)) | dict.fromkeys(sequence.request.as_base, ran[0])
        return [known.get(m, 0.0) for m in range(len(sequence.weights) + 1)]

    def _failure(self, status: int, position: int) -> ValueError:
        bad = [self.members[m].name for i, m in enumerate(self.active, 1) if status >> i & 1]
        what = f"NaN or +inf logits from {', '.join(bad)}" if bad else "every token is masked"
        return ValueError(f"{what} at token {position} of the response")
