"""docs/cli.md names only commands and options that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from genarm_fast.cli import COMMANDS

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def test_help_excerpt_and_options_are_those_of_the_code(cli: Callable) -> None:
    text = DOCS.read_text(encoding="utf-8")
    excerpt = re.search(r"\$ genarm-fast --help\n(.*?)```", text, re.DOTALL)
    assert excerpt
    assert excerpt[1].split() == cli("--help").out.split()
    helps = {name: cli(name, "--help").out for name in COMMANDS}
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help", "--version"}:
        assert any(re.search(rf"{option}(?![\w-])", shown) for shown in helps.values()), option
    for line in re.findall(r"^(?:\$ )?genarm-fast (\w+) (.*(?:\\\n.*)*)", text, re.MULTILINE):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line[1]):
            assert re.search(rf"{option}(?![\w-])", helps[line[0]]), line
