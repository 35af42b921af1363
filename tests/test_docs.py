"""Pages name files, links, Python objects, options and parameters that exist."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genarm_fast import ARM, GenARM
from genarm_fast.integrations.transformers import GenARMLogitsProcessor

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "genarm_fast|kernels|tests|docs|benchmarks|scripts|examples"
IN_FOLDER = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w")
MODULE_FILE = re.compile(r"(?<![\w./:-])(?:[\w-]+/)+[\w-]+\.(?:py|cpp)\b")
LINK = re.compile(r"\]\(([^)\s#:]*)(?:#([^)\s]+))?\)")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
SCRIPT = re.compile(r"(?<![\w/])((?:benchmarks|scripts|examples)/[\w/]+\.py)((?: [^\n`#;|]*)?)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OBJECT = re.compile(r"(?<![\w./-])genarm_fast(?:\.[a-zA-Z_]\w*)+")


def faults(page: Path, text: str) -> list[str]:
    """Return the names in a page that do not exist. Paths count from the repository's root or from `genarm_fast`."""
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
    """Return the names under which GitHub links to headings."""
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


def wrong_snippets(text: str) -> list[str]:
    """Return imports from this package that do not exist, in Python blocks. Raises SyntaxError for a block that is not
    Python."""
    trees = [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.module is not None and node.module.split(".")[0] == "genarm_fast"]
    names = {f"{node.module}.{each.name}" for node in own for each in node.names}
    return sorted(name for name in names if not resolves(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_import_what_exists(page: Path) -> None:
    assert wrong_snippets(page.read_text(encoding="utf-8")) == []


def test_a_wrong_snippet_is_found() -> None:
    assert wrong_snippets("```python\nfrom genarm_fast import ARM, Arm\n```\n") == ["genarm_fast.Arm"]
    with pytest.raises(SyntaxError):
        wrong_snippets("```python\nfor x in\n```\n")


def unproved(text: str) -> list[str]:
    """Return the rows without a test or a command in the last column of tables whose last column is "held by" or "kept
    by"."""
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


def source(script: Path) -> str:
    """Return the source of a script and of the modules beside it that it imports."""
    found, ahead = {}, [script]
    while ahead:
        path = ahead.pop()
        found[path] = path.read_text(encoding="utf-8")
        modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", found[path], re.MULTILINE)
        places = [folder / (each.replace(".", "/") + ".py") for each in modules for folder in (*script.parents,)[:2]]
        ahead += [each for each in places if each.is_file() and each not in found]
    return "".join(found.values())


def unknown_options(text: str) -> list[str]:
    """Return options in a page's commands that the scripts do not have."""
    wrong = []
    for script, given in SCRIPT.findall(re.sub(r"\\\n\s*", " ", text)):
        own = source(ROOT / script)
        made = {f"--{name}" for name in re.findall(r'"(\w+)":', own)} if 'f"--{' in own else set()
        found = [option for option in OPTION.findall(given) if f'"{option}"' not in own and option not in made]
        wrong += [f"{script} {option}" for option in found]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_scripts_exist(page: Path) -> None:
    assert unknown_options(page.read_text(encoding="utf-8")) == []


def test_an_unknown_option_is_found() -> None:
    commands = [
        "python benchmarks/decode.py BASE --tokens 4 \\",
        "    --fast",
        "python scripts/fuzz_ops.py --seconds 3 --slow",
    ]
    text = "\n".join(commands)
    assert unknown_options(text) == ["benchmarks/decode.py --fast", "scripts/fuzz_ops.py --slow"]


@pytest.mark.parametrize(
    ("shown", "function"),
    [
        ("from_pretrained", GenARM.from_pretrained),
        ("ARM", ARM),
        ("GenARMLogitsProcessor", GenARMLogitsProcessor),
        ("model.generate", GenARM.generate),
        ("model.warm_up", GenARM.warm_up),
        ("model.score", GenARM.score),
    ],
)
def test_signatures_have_every_parameter(shown: str, function: Callable[..., Any]) -> None:
    """A signature in docs/api.md that has a star before its keywords lists all parameters."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    signature = next(each for each in re.findall(rf"`{re.escape(shown)}\(([^`]*)\)`", text) if "*" in each)
    names = re.findall(r"(\w+)(?:=[^,]*)?(?:,|$)", signature)
    assert sorted(names) == sorted(set(inspect.signature(function).parameters) - {"self"})
