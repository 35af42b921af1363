"""The layers of the packages: imports go downwards only, no modules form a circle, and the root stays small.

Imports are read from the source, including those for type checking and those inside functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {"genarm_fast": ROOT / "genarm_fast", "genarm_fast.kernels": ROOT / "kernels" / "ops"}
LAYERS = [  # each may import itself and the layers below it
    {"__main__"},
    {"cli"},
    {"demo", "jobs", "train", "bench", "integrations"},
    {"__init__"},
    {"functional"},
    {"kept"},
    {"api"},
    {"engine"},
    {"models", "speculation"},
    {"reference"},
    {"device", "text", "kernels"},
    {"utils", "params", "outputs", "errors"},
]
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
MOST_ROOT_MODULES = 10


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in PLACES.items():
        for path in folder.rglob("*.py"):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield this package's modules that the module imports. `from a import b` gives a.b if that is a module, else a."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [child if (child := f"{source}.{alias.name}") in known else source for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in known and name != module)


def edges(known: dict[str, Path]) -> set[tuple[str, str]]:
    return {(module, name) for module, path in known.items() for name in imported(module, path, known)}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(a, b) for a, b in found if layer(a) != layer(b) and RANK[layer(a)] >= RANK[layer(b)] != RANK["utils"]}


def circular(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the edges between modules that reach each other."""
    below: dict[str, set[str]] = {}
    for a, b in found:
        below.setdefault(a, set()).add(b)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for each in below.get(todo.pop(), set()) - seen:
                seen.add(each)
                todo.append(each)
        return seen

    return {(a, b) for a, b in found if a in reached(b)}


def test_packages_import_downwards_and_in_no_circle() -> None:
    found = edges(modules())
    assert upward(found) | circular(found) == set()


def test_every_package_has_a_layer() -> None:
    assert {layer(module) for module in modules()} == set(RANK)


def test_few_modules_in_the_root() -> None:
    assert len(list((ROOT / "genarm_fast").glob("*.py"))) <= MOST_ROOT_MODULES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from genarm_fast.api import GenARM", "genarm_fast.api"),
        ("def f():\n    from .. import api", "genarm_fast.api"),
        ("if TYPE_CHECKING:\n    from genarm_fast import kernels", "genarm_fast.kernels"),
        ("import genarm_fast.text.prompts as p", "genarm_fast.text.prompts"),
    ],
)
def test_every_form_of_an_import_is_seen(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "prompts.py"
    path.write_text(text)
    assert list(imported("genarm_fast.text.new", path, modules())) == [expected]
    assert ("genarm_fast.text.new", expected) in upward({("genarm_fast.text.new", expected)}) or "text" in expected


def test_a_circle_is_found() -> None:
    found = {("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}
    assert circular(found) == {("a", "b"), ("b", "c"), ("c", "a")}
