"""How far a command is: a bar on a terminal's stderr, nothing elsewhere or with --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def bar(what: str, *, is_quiet: bool, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """`show(done, total)`, of so many `what`; or of bytes that are `what`."""
    counts = (MofNCompleteColumn(), TimeElapsedColumn())
    sizes = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn(what), BarColumn(), *(sizes if in_bytes else counts))
    is_shown = sys.stderr.isatty() and not is_quiet
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown) as progress:
        task = progress.add_task("")
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def counting_bar(what: str, total: int, *, is_quiet: bool) -> Iterator[Callable[[], None]]:
    """`note()`: one more of `total` is done."""
    with bar(what, is_quiet=is_quiet) as show:
        done = count(1)
        yield lambda: show(next(done), total)
