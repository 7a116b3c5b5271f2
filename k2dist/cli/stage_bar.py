"""A bar for long measurements: the stage and how much of it all is done, on a terminal's stderr only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def stage_bar(total: int, *, is_quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What to call when a stage begins, and when one of `total` pieces is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    is_shown = not is_quiet and sys.stderr.isatty()
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not is_shown,
    ) as progress:
        task = progress.add_task("starting", total=total)
        yield (lambda text: progress.update(task, description=text)), (lambda: progress.advance(task))
