"""Tables are written into pages between their marks; peak memory counts one process only."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = "from result_files import peak_resident; print(peak_resident())"
PARENT = f"""
import subprocess, sys
from result_files import peak_resident
held = b"x" * {1200 << 20}
print(peak_resident())
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


@pytest.fixture
def fill(script):
    return script("result_files").fill


def test_fill_replaces_marked_blocks_and_nothing_else(fill):
    document = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    filled = fill(document, {"x": r"new \1"})
    assert filled == "a\n<!-- begin x -->\nnew \\1\n<!-- end x -->\nb"
    assert fill(filled, {"x": "new \\1\n"}) == filled


@pytest.mark.parametrize("page", ["", "<!-- end x -->\n<!-- begin x -->\n", "<!-- begin x -->\n<!-- end y -->"])
def test_a_page_without_marks(fill, page):
    with pytest.raises(ValueError, match="expected <!-- begin x --> and <!-- end x --> around"):
        fill(page, {"x": "table"})


def test_peak_memory_is_that_of_the_process_alone() -> None:
    """A child of a parent that holds 1.2 GiB has imported torch, and no more; ru_maxrss would say 1.5 GiB."""
    folder = Path(__file__).parents[2] / "benchmarks"
    printed = subprocess.run([sys.executable, "-c", PARENT], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    parent, child = (int(line) / 2**20 for line in printed.stdout.split())
    assert 1200 < parent < 2200
    assert 50 < child < 900
