"""The sequences of a step as the device knows them: row r of every tensor belongs to sequence r.

A step changes the last tokens, the lengths and which sequences have finished. These stay on the device, so the host can
launch the next step before it has read this one. When sequences join or leave, the tensors are made anew.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genarm_fast.device.base import WorkStream
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.penalties import bias_tensor, bias_version
from genarm_fast.engine.sequence import Sequence
from genarm_fast.engine.step_tensors import SamplingTensors, State
from genarm_fast.kernels import Settled, seed_tensor


class Batch:
    """The R sequences of a step, and the members that run for them.

    active: indices of these members in the engine, base first. epochs: each sequence's epoch when the batch was made.
    shape: number of rows of all tensors, if more than R, and the width H of `State.texts`. Rows after R repeat the
    first one, so that few shapes exist; nobody reads them. before: the batch of the previous step, whose texts are
    reused. in_graph: whether the tensors are those of a captured graph; see
    `with_graph_tensors`. report_numbers: output tensors of steps that are one launch, by the number of drafts and the
    width of a row; the host reads them.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        active: tuple[int, ...],
        executor: Executor,
        vocab_size: int,
        shape: tuple[int, int] = (0, 0),
        before: Batch | None = None,
    ) -> None:
        width, text_width = shape
        self.sequences, self.active, self.executor, self.vocab_size = sequences, active, executor, vocab_size
        self.rows = sequences + sequences[:1] * (width - len(sequences))
        self.slots = [sequence.slot for sequence in self.rows]
        self.epochs = [sequence.epoch for sequence in sequences]
        self.state = self._upload(self._texts(before, text_width))
        self.wants_logprobs = any(sequence.request.wants_logprobs for sequence in sequences)
        self.has_bias = any(sequence.request.has_bias for sequence in sequences)
        most = max(sequence.request.params.logprobs or 0 for sequence in sequences)
        self.top_logprobs = min(most, vocab_size)
        self.base_weights = [sequence.base_token_weights for sequence in self.rows]
        self.plain_base = all(each == (1.0,) for each in self.base_weights)
        self.in_graph = False
        self.report_numbers: dict[tuple[int, int], Tensor] = {}
        self._sampling: dict[WorkStream, SamplingTensors] = {}
        self._cache_rows: dict[int, Tensor] = {}
        self._bias: tuple[Any, Tensor | None] = (None, None)

    def __len__(self) -> int:
        return len(self.sequences)

    @classmethod
    def following(
        cls,
        before: Batch | None,
        in_flight: bool,
        sequences: list[Sequence],
        active: tuple[int, ...],
        executor: Executor,
        vocab_size: int,
        shape: tuple[int, int] = (0, 0),
    ) -> Batch:
        """Return the batch of the next step: `before` if nothing changed, else a new one with its state on the device.

        in_flight: whether the last step of `before` is unread, so that only the device knows how long its texts are.
        """
        slots, epochs = [sequence.slot for sequence in sequences], [sequence.epoch for sequence in sequences]
        if before is not None and before.sequences == sequences and before.active == active:
            own = max(shape[0], len(slots)), shape[1]
            if (before.slots[: len(slots)], before.epochs, before.state.texts.shape) == (slots, epochs, own):
                return before
        batch = cls(sequences, active, executor, vocab_size, shape, before)
        if before is not None and in_flight:
            rows = {id(sequence): row for row, sequence in enumerate(before.sequences)}
            kept = [
                (row, rows[id(sequence)])
                for row, sequence in enumerate(batch.rows)
                if id(sequence) in rows and before.epochs[rows[id(sequence)]] == sequence.epoch
            ]
            if kept:
                batch._copy_state(before, *zip(*kept))
        return batch

    def with_graph_tensors(self, state: State, sampling: SamplingTensors, bias: Tensor | None) -> Batch:
        """Return the same batch over the tensors of a graph that is being captured. It uploads nothing."""
        own = copy(self)
        own.state, own.in_graph = state, True
        own._sampling, own._bias = {self.executor.main: sampling}, (self._bias[0], bias)
        return own

    def _copy_state(self, before: Batch, rows: tuple[int, ...], before_rows: tuple[int, ...]) -> None:
        """Copy last tokens, lengths and finished flags from rows `before_rows` of `before` to `rows` of this batch."""
        target, source = (self.executor.upload(torch.tensor(index)) for index in (rows, before_rows))
        for name in ("last", "lengths", "finished"):
            mine, other = getattr(self.state, name), getattr(before.state, name)
            mine.index_copy_(-1, target, other.index_select(-1, source))

    def _texts(self, before: Batch | None, width: int) -> Tensor:
        """Return `State.texts`. Texts of `before` that are still right stay on the device; the host uploads the others.

        A text of `before` is right even if the host has not read its last tokens yet. Rows without a sequence of their
        own keep any contents.
        """
        count, upload = len(self.rows), self.executor.upload
        known = None if before is None or before.state.texts.shape[1] != width else before.state.texts
        there: dict[int, int] = {}
        if before is not None and known is not None:
            there = {id(each): row for row, each in enumerate(before.sequences) if before.epochs[row] == each.epoch}
        new = [row for row, each in enumerate(self.sequences) if id(each) not in there]
        if known is None or not width:
            texts = upload(torch.zeros(1, dtype=torch.int64)).new_zeros(count, width)
        else:
            source = [row if row < len(known) else 0 for row in range(count)]
            for row, each in enumerate(self.sequences):
                source[row] = there.get(id(each), source[row])
            same = source == list(range(len(known)))
            texts = known if same else known.index_select(0, upload(torch.tensor(source)))
        if new and width:
            joined = [self.sequences[row] for row in new]
            lines = [torch.tensor([*each.request.token_ids[0], *each.tokens]) for each in joined]
            block = pad_sequence(lines, batch_first=True)
            texts.narrow(1, 0, block.shape[1]).index_copy_(0, upload(torch.tensor(new)), upload(block))
        return texts

    def _upload(self, texts: Tensor) -> State:
        """Return the state of the sequences as the host knows it, uploaded, with these texts."""
        sequences, members = self.rows, range(len(self.executor.members))
        stops = [sorted(sequence.request.stop_ids) for sequence in sequences]
        # A graph is captured for each width, so it is rounded up to a power of two.
        width = 1 << max(2, (max(map(len, stops)) - 1).bit_length())
        prompts = [[len(each.request.token_ids[m]) - 1 for each in sequences] for m in members]
        known = (
            torch.tensor([[each.last_token(m) for each in sequences] for m in members]),
            torch.tensor(prompts),
            torch.tensor([len(each.tokens) for each in sequences]),
            torch.tensor([each.request.params.max_new_tokens for each in sequences]),
            torch.zeros(len(sequences), dtype=torch.bool),
            torch.tensor([each + [-1] * (width - len(each)) for each in stops]),
        )
        return State._make([*map(self.executor.upload, known), texts])

    def tokens(self, members: list[int]) -> Tensor:
        """Return `State.tokens`, on the main stream."""
        return self.state.tokens(members)

    def positions(self, members: list[int]) -> Tensor:
        """Return `State.positions`, on the main stream."""
        return self.state.positions(members)

    def response_positions(self, width: int) -> Tensor:
        """Return `State.response_positions`, on the main stream."""
        return self.state.response_positions(width)

    def texts(self) -> tuple[Tensor, Tensor]:
        """Return `State.texts` and their lengths, on the main stream."""
        return self.state.texts, self.state.text_lengths()

    def kv_bound(self, members: list[int], width: int) -> int:
        """Return a number above all positions that a forward of the last token and what follows reads or writes.

        width: tokens of each row in that forward.
        """
        rows = self.sequences
        return width + max(each.request.starts[m] + len(each.tokens) + each.unread for each in rows for m in members)

    def accept(self, targets: Tensor, drafts: Tensor, draft_counts: Tensor | None = None) -> Settled:
        """Accept drafts as `State.accept` does, and keep the next step's state."""
        self.state, settled = self.state.accept(targets, drafts, draft_counts)
        return settled

    def cache_rows(self, g: int, members: list[int]) -> Tensor:
        """Return the rows of runner g's cache that hold the sequences for these members, int64 [L·R], main stream."""
        if g not in self._cache_rows:
            index = self.executor.runners[g].row_index(self.slots, self.executor.lanes(members))
            self._cache_rows[g] = self.executor.upload(torch.tensor(index))
        return self._cache_rows[g]

    def sampling(self, stream: WorkStream) -> SamplingTensors:
        """Return the sequences' sampling parameters for use on `stream`."""
        if self.in_graph:  # a graph's tensors live as long as it does, and its other streams wait for the main one
            return self._sampling[self.executor.main]
        if stream not in self._sampling:
            params = [sequence.request.params for sequence in self.rows]
            columns = {
                "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float32),
                "seeds": seed_tensor([sequence.seed for sequence in self.rows]),
            }
            if any(0 < p.top_k < self.vocab_size for p in params):
                columns["top_k"] = torch.tensor([min(p.top_k, self.vocab_size) for p in params])
            if any(p.top_p < 1 for p in params):
                columns["top_p"] = torch.tensor([p.top_p for p in params], dtype=torch.float32)
            if any(p.min_p > 0 for p in params):
                columns["min_p"] = torch.tensor([p.min_p for p in params], dtype=torch.float32)
            upload = self.executor.device.upload
            self._sampling[stream] = SamplingTensors(
                upload(self._weights(), stream),
                {name: upload(column, stream) for name, column in columns.items()},
            )
        return self._sampling[stream]

    def weights(self, stream: WorkStream, positions: Tensor) -> Tensor:
        """Return the weights at these positions, as `SamplingTensors.at` does, for use on `stream`."""
        return self.sampling(stream).at(positions)

    def _weights(self) -> Tensor:
        """Return the weights of `SamplingTensors`, on the host.

        An ARM that is the base itself adds its weight to the base's, and has weight 0 in its own column.
        """
        lines = [
            [base, *((0.0,) if m in sequence.request.as_base else sequence.token_weights(m) for m in self.active[1:])]
            for sequence, base in zip(self.rows, self.base_weights)
        ]
        longest = max(len(line) for each in lines for line in each)
        longest = 1 << (longest - 1).bit_length()  # graphs are captured for each length, so few lengths exist
        table = [[line + line[-1:] * (longest - len(line)) for line in each] for each in lines]
        return torch.tensor(table, dtype=torch.float32).transpose(1, 2).contiguous()

    def bias(self) -> Tensor | None:
        """Return the numbers that `bias_tensor` adds to combined logits, float32 [R, V] on the main stream, or None."""
        if not self.has_bias:
            return None
        lengths = [len(sequence.tokens) + sequence.unread for sequence in self.rows]
        version = bias_version(self.rows, lengths)
        if self._bias[0] != version:
            bias = bias_tensor(self.rows, lengths, self.vocab_size)
            self._bias = version, None if bias is None else self.executor.upload(bias)
        return self._bias[1]
