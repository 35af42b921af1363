"""A plugin for pytest: `--shard 2/8` runs tests 2, 10, 18, ... of those that were collected, counted from 0."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N")


@pytest.hookimpl(trylast=True)  # runs after `-m` has removed the tests that it leaves out
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]
