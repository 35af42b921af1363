"""Comments and docstrings stand by themselves: none is a fragment that completes the name or the code beside it."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENINGS = "of|as|by|which|that"  # words that a fragment begins with: `SECONDS = 300  # of a test`
TRAILING = re.compile(rf"^\s*[^\s#/].*?\s(#|//) ({OPENINGS}) ")
DOCSTRING = re.compile(r'^\s*"""(Of|As of) (?!two|all)')


def fragments(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if TRAILING.match(line) or DOCSTRING.match(line)]


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.h", "*.cpp"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:  # an unpacked source distribution has no git
        listed = [str(path) for part in ("genarm_fast", "kernels", "tests") for path in (ROOT / part).rglob("*.py")]
    return [ROOT / name for name in listed if Path(name).name != Path(__file__).name]


def test_no_comment_is_a_fragment() -> None:
    found = {path.relative_to(ROOT).as_posix(): fragments(path.read_text(encoding="utf-8")) for path in sources()}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("line", "is_fragment"),
    [
        ("SECONDS = 300  # of a test with its engine", True),
        ("  int rows;  // of a block at most", True),
        ('    """Of each row."""', True),
        ("SECONDS = 300  # time limit of one test", False),
        ("    # of the sentence that began in the line above", False),
        ('    """Return the sum of each row."""', False),
    ],
)
def test_fragments_are_seen(line: str, is_fragment: bool) -> None:
    assert fragments(line) == ([line.strip()] if is_fragment else [])
