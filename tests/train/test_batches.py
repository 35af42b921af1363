"""Micro-batches of a run, and the two layouts of a batch."""

from __future__ import annotations

from genarm_fast.kernels.arm_logps import IGNORE
from genarm_fast.train.batches import Collator, PairBatches, rows, shared
from genarm_fast.train.encode import Encoded

PAIRS = [Encoded(0, [10, 11, 12], [20, 21, 2], [30, 2]), Encoded(1, [13], [22, 2], [31, 32, 33, 2])]


def test_every_epoch_has_every_pair_once() -> None:
    batches = PairBatches(list(range(103)), size=4, epochs=2, seed=0)
    assert len(batches) == 52
    epochs = [[i for batch in batches.batches[start : start + 26] for i in batch] for start in (0, 26)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(103))
    assert epochs[0] != epochs[1]


def test_order_depends_on_the_seed_alone() -> None:
    first, again, other = (list(PairBatches(list(range(50)), size=4, epochs=1, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_parts_of_epochs() -> None:
    whole = PairBatches(list(range(40)), size=4, epochs=2, seed=0)
    assert list(PairBatches(list(range(40)), size=4, epochs=1.5, seed=0)) == whole.batches[:15]
    assert len(PairBatches([5], size=4, epochs=0.1, seed=0)) == 1


def test_pairs_of_a_batch_have_similar_lengths() -> None:
    """Padding to the longest pair costs little, and batches do not come in order of length."""
    lengths = [(i * 7919) % 1000 for i in range(1000)]
    batches = list(PairBatches(lengths, size=4, epochs=1, seed=0))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_rows_layout() -> None:
    batch = rows(PAIRS, 0)
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 20, 21],
        [13, 22, 0, 0, 0],
        [10, 11, 12, 30, 0],
        [13, 31, 32, 33, 0],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch["targets"].tolist() == [
        [20, 21, 2, IGNORE],
        [22, 2, IGNORE, IGNORE],
        [30, 2, IGNORE, IGNORE],
        [31, 32, 33, 2],
    ]
    assert batch["index"].tolist() == [[2, 3, 4, 0], [5, 6, 0, 0], [12, 13, 0, 0], [15, 16, 17, 18]]


def test_shared_layout() -> None:
    """Each response sees the prompt and itself, at the positions that follow the prompt."""
    batch = shared(PAIRS, 0)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30], [13, 22, 31, 32, 33, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 3, 0]]
    assert batch["targets"].equal(rows(PAIRS, 0)["targets"])
    assert batch["index"].tolist() == [[2, 3, 4, 0], [6, 7, 0, 0], [2, 5, 0, 0], [6, 8, 9, 10]]
    mask = batch["attention_mask"]
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert mask.any(-1).all(), "a row that sees nothing makes NaN"


def test_collator_counts_tokens() -> None:
    batch = Collator("rows", 0)(PAIRS)
    assert batch["tokens"].tolist() == [8, 7]
