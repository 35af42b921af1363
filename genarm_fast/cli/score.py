"""`genarm-fast score`: rewards of given responses; for chosen/rejected pairs, each ARM's accuracy and margin."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from genarm_fast.cli.display import reward_table, token_table
from genarm_fast.cli.loading import add_format_arguments, add_loading_arguments, formatted, load
from genarm_fast.jsonlines import dumps, located, read_objects

if TYPE_CHECKING:
    from genarm_fast.api import GenARM
    from genarm_fast.outputs import ScoreOutput
    from genarm_fast.prompts import Prompt

RESPONSE, PAIR = ("response",), ("chosen", "rejected")


@dataclass(frozen=True)
class Row:
    """An input line: a prompt and one response, or a chosen and a rejected one."""

    line: int
    id: Any
    prompt: Prompt
    responses: tuple[str, ...]
