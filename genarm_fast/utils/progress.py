"""A progress bar that is shown on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from genarm_fast.utils.checks import check_flag


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Give the block a function to call with numbers of newly finished completions. The bar goes to stderr.

    show: without it there is no bar, and the function does nothing. Raises TypeError if it is not a bool.
    """
    if not check_flag("progress", show):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generate", total=total)
        yield lambda count: bar.advance(task, count)
