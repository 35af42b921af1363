"""Decide which chat templates run in this process: those without an operation that can take long by itself.

A template can be stopped between two operations. It can't be stopped inside one, such as 9 ** 9 ** 9, or a text of
10^12 spaces.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

FILTERS = {
    "abs", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "unique", "upper", "join", "replace",
    "indent",
}  # fmt: skip
METHODS = {
    "append", "capitalize", "count", "endswith", "find", "get", "index", "isdigit", "items", "join", "keys", "lower",
    "lstrip", "replace", "rfind", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    "values",
}  # fmt: skip
FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict"}  # macros of the template are allowed too
# Most characters of a text, and the largest number, that may be inserted in many places.
LONGEST = 64


@lru_cache(64)
def is_plain(template: str) -> bool:
    """Whether no operation of a template takes long by itself. Raises Jinja's own errors for a faulty template."""
    tree = _environment.parse(template)
    macros = {node.name for node in tree.find_all(nodes.Macro)}
    ranges = any(node.name == "range" for node in tree.find_all(nodes.Name))
    return not any(_may_take_long(node, macros, ranges) for node in tree.find_all(nodes.Node))


def _may_take_long(node: nodes.Node, macros: set[str], ranges: bool) -> bool:
    if isinstance(node, (nodes.Mul, nodes.Pow)):
        return True
    # On a text, `%` is a format. The loop's counters are numbers.
    if isinstance(node, nodes.Mod):
        left = node.left
        return not (isinstance(left, nodes.Getattr) and isinstance(left.node, nodes.Name) and left.node.name == "loop")
    if isinstance(node, nodes.Filter):
        return _is_long(node.name, node, FILTERS, ranges)
    if isinstance(node, nodes.Call):
        called = node.node
        if isinstance(called, nodes.Getattr):
            return _is_long(called.attr, node, METHODS, ranges)
        return not (isinstance(called, nodes.Name) and called.name in FUNCTIONS | macros | {"caller"})
    return isinstance(node, (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends, nodes.FilterBlock))


def _is_long(name: str, node: nodes.Filter | nodes.Call, known: set[str], ranges: bool) -> bool:
    if name not in known or node.dyn_args is not None or node.dyn_kwargs is not None:
        return True
    values = [*node.args, *(pair.value for pair in node.kwargs)]
    if name == "join":
        return ranges or not all(
            _is_short(value) for value in values if not isinstance(value, nodes.Filter | nodes.Name)
        )
    return name in ("replace", "indent", "tojson") and not all(map(_is_short, values))


def _is_short(value: nodes.Node) -> bool:
    """Whether a value is a constant in the template, and small."""
    if not isinstance(value, nodes.Const):
        return False
    return len(value.value) <= LONGEST if isinstance(value.value, str) else abs(value.value or 0) <= LONGEST


class _Generation(loopcontrols):
    """A parser that accepts transformers' `{% generation %}` blocks."""

    tags = loopcontrols.tags | {"generation"}

    def parse(self, parser: Any) -> Any:
        if parser.stream.current.value != "generation":
            return super().parse(parser)
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


_environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation])
