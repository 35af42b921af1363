"""README, CONTRIBUTING and docs name files, links and Python objects that exist."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "genarm_fast|kernels|tests|docs|benchmarks|scripts|examples"
IN_FOLDER = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w")
MODULE_FILE = re.compile(r"(?<![\w./:-])(?:[\w-]+/)+[\w-]+\.(?:py|cpp)\b")
LINK = re.compile(r"\]\(([^)\s#:]*)(?:#([^)\s]+))?\)")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
OBJECT = re.compile(r"(?<![\w./-])genarm_fast(?:\.[a-zA-Z_]\w*)+")


def faults(page: Path, text: str) -> list[str]:
    """What a page names that is not there. Paths count from the repository's root or from `genarm_fast`."""
    missing = [
        path
        for path in {*IN_FOLDER.findall(text), *MODULE_FILE.findall(text)}
        if not (ROOT / path).exists() and not (ROOT / "genarm_fast" / path).exists()
    ]
    for path, test in TEST.findall(text):
        if f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8"):
            missing.append(f"{path}::{test}")
    for link, anchor in LINK.findall(text):
        target = page.parent / link if link else page
        if not target.exists():
            missing.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            missing.append(f"{link}#{anchor}")
    return sorted([*missing, *(name for name in set(OBJECT.findall(text)) if not resolves(name))])


def anchors(text: str) -> set[str]:
    """Names under which GitHub links to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert faults(page, page.read_text(encoding="utf-8")) == []


def unproved(text: str) -> list[str]:
    """Rows of the tables whose last column says what holds them, and which name neither a test nor a command."""
    rows, bare = iter(text.splitlines()), []
    for row in rows:
        if row.endswith(("| held by |", "| kept by |")):
            next(rows)  # the line below the heading
            for each in rows:
                if not each.startswith("|"):
                    break
                if not re.search(r"`(tests/\S+\.py(::\w+)?|make \w+)`", each.rsplit("|", 2)[1]):
                    bare.append(each)
    return bare


@pytest.mark.parametrize("name", ["compatibility.md", "reliability.md"])
def test_every_promise_names_what_holds_it(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text.count("::test_") > 5
    assert unproved(text) == []


def test_a_promise_without_a_test_is_found() -> None:
    heading = "| what | held by |\n|---|---|\n"
    assert unproved(heading + "| a | `tests/test_docs.py::test_b` |\n| c | by hand |\n\n| d | e |") == [
        "| c | by hand |"
    ]
    assert unproved(heading + "| a | `make soak` |\n") == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`kernels/ops/nothing`", "kernels/ops/nothing"),
        ("run `engine/rooms.py`", "engine/rooms.py"),
        ("python benchmarks/fast.py --json", "benchmarks/fast.py"),
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a heading](docs/api.md#no-such-heading)", "docs/api.md#no-such-heading"),
        ("`tests/test_docs.py::test_nothing`", "tests/test_docs.py::test_nothing"),
        ("`genarm_fast.requests.sample_seed(seed, i)`", "genarm_fast.requests.sample_seed"),
    ],
)
def test_what_is_missing_is_found(text: str, found: str) -> None:
    assert faults(ROOT / "README.md", text) == [found]


def test_what_exists_is_no_fault() -> None:
    text = "`engine/step.py`, genarm_fast/engine, [API](docs/api.md#score), `genarm_fast.kernels.settle`, a/b, x.py"
    assert faults(ROOT / "README.md", text) == []
