"""A progress bar that is only there on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from genarm_fast.utils.checks import check_flag


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that counts finished completions; the bar goes to stderr. Raises TypeError for no bool."""
    if not check_flag("progress", show):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generate", total=total)
        yield lambda count: bar.advance(task, count)
