"""settle agrees with hand-worked rounds and with a plain loop."""

import pytest
import torch

import genarm_fast.kernels
from genarm_fast.kernels import _native, settle_reference


@pytest.fixture(params=[settle_reference, genarm_fast.kernels.settle], ids=["reference", "dispatcher"])
def settle(request):
    return request.param


STOP = 9
# (drafts, targets, drafts used, length, limit, finished) → (count, next input, new length, finished)
ROUNDS = {
    "all right": ([1, 2, 3], [1, 2, 3, 4], 3, 5, 99, False, (4, 4, 9, False)),
    "none right": ([7, 2, 3], [1, 2, 3, 4], 3, 5, 99, False, (1, 1, 6, False)),
    "right again after a mistake": ([1, 7, 3], [1, 2, 3, 4], 3, 5, 99, False, (2, 2, 7, False)),
    "fewer drafts": ([1, 2, 3], [1, 2, 3, 4], 1, 5, 99, False, (2, 2, 7, False)),
    "no drafts": ([1, 2, 3], [1, 2, 3, 4], 0, 5, 99, False, (1, 1, 6, False)),
    "stop inside": ([1, STOP, 3], [1, STOP, 3, 4], 3, 5, 99, False, (2, STOP, 7, True)),
    "stop after a mistake is not settled": ([7, 2, 3], [1, STOP, 3, 4], 3, 5, 99, False, (1, 1, 6, False)),
    "stop as the correction": ([1, 7, 3], [1, STOP, 3, 4], 3, 5, 99, False, (2, STOP, 7, True)),
    "limit inside": ([1, 2, 3], [1, 2, 3, 4], 3, 5, 7, False, (2, 2, 7, True)),
    "limit before the stop": ([1, 2, STOP], [1, 2, STOP, 4], 3, 5, 7, False, (2, 2, 7, True)),
    "at the limit": ([1, 2, 3], [1, 2, 3, 4], 3, 7, 7, False, (0, 1, 7, True)),
    "finished before": ([1, 2, 3], [1, 2, 3, 4], 3, 5, 99, True, (0, 1, 5, True)),
}


def batch(rounds):
    drafts, targets, used, lengths, limits, finished, expected = zip(*rounds, strict=True)
    names = ("drafts", "targets", "draft_counts", "lengths", "limits", "finished")
    columns = (drafts, targets, used, lengths, limits, finished)
    arguments = {name: torch.tensor(column) for name, column in zip(names, columns, strict=True)}
    return arguments | {"stop_ids": torch.tensor([STOP, -1])}, expected


def test_hand_worked_rounds(settle):
    arguments, expected = batch(ROUNDS.values())
    found = settle(**arguments)
    for i, name in enumerate(ROUNDS):
        assert tuple(column[i].item() for column in found) == expected[i], name


def test_all_drafts_count_by_default(settle):
    arguments, _ = batch([ROUNDS["all right"]])
    del arguments["draft_counts"]
    assert settle(**arguments).counts.tolist() == [4]


def by_loop(drafts, targets, used, length, limit, finished, stops):
    count = 0
    while not finished and length < limit:
        token = targets[count]
        count, length = count + 1, length + 1
        finished = token in stops or length >= limit
        if count > used or drafts[count - 1] != token:
            break
    return count, length, finished or length >= limit


def random_rounds(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 12, (rows, width), generator=generator)
    wrong = torch.rand(rows, width - 1, generator=generator) < 0.2
    lengths = torch.randint(0, 6, (rows,), generator=generator)
    return {
        "targets": targets,
        "drafts": torch.where(wrong, 50, targets[:, :-1]),
        "draft_counts": torch.randint(0, width, (rows,), generator=generator),
        "lengths": lengths,
        "limits": lengths + torch.randint(0, 9, (rows,), generator=generator),
        "finished": torch.rand(rows, generator=generator) < 0.1,
        "stop_ids": torch.randint(-1, 12, (rows, 2), generator=generator),
    }


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_random_rounds(settle, width):
    arguments = random_rounds(300, width, width)
    found = settle(**arguments)
    for row in range(300):
        one = {name: column[row].tolist() for name, column in arguments.items()}
        count, length, finished = by_loop(
            one["drafts"], one["targets"], one["draft_counts"], one["lengths"], one["limits"], one["finished"],
            one["stop_ids"],
        )  # fmt: skip
        assert (found.counts[row], found.lengths[row], found.finished[row]) == (count, length, finished)
        if count:
            assert found.next_tokens[row] == one["targets"][count - 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("targets", torch.zeros(3, 0)),
        ("drafts", torch.zeros(1, 4)),
        ("lengths", torch.zeros(2)),
        ("draft_counts", torch.zeros(1, 1)),
        ("stop_ids", torch.zeros(2, 3)),
    ],
)
def test_refusals_name_the_argument(settle, name, value):
    arguments, _ = batch([ROUNDS["all right"]])
    with pytest.raises(ValueError, match=f"{name} of shape"):
        settle(**(arguments | {name: value.long()}))


def test_dtypes_and_devices_are_checked(settle):
    arguments, _ = batch([ROUNDS["all right"]])
    with pytest.raises(TypeError, match=r"finished of dtype torch.int64: expected torch.bool"):
        settle(**(arguments | {"finished": arguments["finished"].long()}))
    with pytest.raises(TypeError, match=r"targets of dtype torch.float32: expected torch.int64"):
        settle(**(arguments | {"targets": arguments["targets"].float()}))
    with pytest.raises(ValueError, match="stop_ids on meta: expected cpu, where targets are"):
        settle(**(arguments | {"stop_ids": arguments["stop_ids"].to("meta")}))


def test_no_stop_ids(settle):
    arguments, _ = batch([ROUNDS["all right"]])
    never = settle(**(arguments | {"stop_ids": torch.full((1,), -1)}))
    for none in (torch.zeros(0), torch.zeros(1, 0)):
        found = settle(**(arguments | {"stop_ids": none.long()}))
        assert all(torch.equal(x, y) for x, y in zip(found, never, strict=True))


@pytest.mark.skipif(_native.core is None, reason="built without a compiler")
def test_core_reads_strides_and_leaves_other_dtypes_to_the_reference():
    arguments = random_rounds(40, 5, 0)
    expected = settle_reference(**arguments)
    names = ("targets", "drafts", "lengths", "limits", "finished", "stop_ids", "draft_counts")
    strided = {name: torch.stack([arguments[name], arguments[name]], -1)[..., 0] for name in names}
    assert strided["targets"].stride() == (10, 2)
    found = _native.core.settle(*(strided[name] for name in names))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    narrow = arguments | {"lengths": arguments["lengths"].int()}
    assert _native.core.settle(*(narrow[name] for name in names)) is None
    assert torch.equal(genarm_fast.kernels.settle(**narrow).counts, expected.counts)
