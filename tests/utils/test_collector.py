"""`collector_waits` delays Python's garbage collector: it leaves the caller's settings alone, and circles are found
later."""

from __future__ import annotations

import gc
import weakref

import pytest

from genarm_fast.utils.collector import collector_waits


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collecting():
    gc.collect()
    yield
    gc.unfreeze()
    gc.enable()


def collections(waits):
    """Return how often the collector runs while 100,000 lasting objects are made, and the objects."""
    before = sum(generation["collections"] for generation in gc.get_stats())
    if waits:
        with collector_waits():
            kept = [[] for _ in range(100_000)]
    else:
        kept = [[] for _ in range(100_000)]
    again = sum(generation["collections"] for generation in gc.get_stats())
    return again - before, kept


def test_what_stays_is_not_looked_at():
    count, kept = collections(waits=True)
    assert count == 0
    assert gc.isenabled()
    assert not {id(each) for each in gc.get_objects(generation=0)} & {id(each) for each in kept}
    assert collections(waits=False)[0] > 50


def test_circles_are_found_later():
    with collector_waits():
        circle = weakref.ref(Circle())
    assert circle() is not None
    gc.collect()
    assert circle() is None


def test_an_error_ends_the_wait():
    with pytest.raises(KeyError), collector_waits():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    with collector_waits(), collector_waits():
        assert not gc.isenabled()
    assert not gc.isenabled()


def is_frozen(each):
    """Whether the collector overlooks `each`: its generations do not contain the object.

    The count of frozen objects would not do, as other tests' frozen objects die meanwhile.
    """
    return all(known is not each for known in gc.get_objects())


def test_what_the_caller_froze_stays_frozen():
    witness = Circle()
    assert not is_frozen(witness)
    gc.freeze()
    with collector_waits():
        later = Circle()
    assert is_frozen(witness)
    assert not is_frozen(later)
    gc.unfreeze()
    assert not is_frozen(witness)
