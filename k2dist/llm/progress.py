"""How far a load or a batch of prompts is: a bar on a terminal's stderr, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from k2dist.llm.output import Output
from k2dist.messages import RankProgress
from k2dist.observe.pace import Pace
from k2dist.observe.work import work_line, work_of


@contextmanager
def loading_bar(num_ranks: int, *, is_shown: bool | None) -> Iterator[Callable[[int, RankProgress], None]]:
    """What to call with a rank's number and how far it is. Ranks come one after the other."""
    if not _is_shown(is_shown):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        shown, task = "", bars.add_task("")

        def show(world_rank: int, progress: RankProgress) -> None:
            nonlocal shown, task
            work = work_of([progress])
            if not work.is_bytes:  # the bar counts bytes
                bars.update(
                    task, description=f"rank {world_rank + 1} of {num_ranks} {work_line(work, Pace())}"
                )
                return
            text = f"rank {world_rank + 1} of {num_ranks} {work.what}"
            if text != shown:  # a new bar, so that the time left is of this work alone
                bars.remove_task(task)
                shown, task = text, bars.add_task(text)
            bars.update(task, completed=work.done, total=work.total)

        yield show


@contextmanager
def progress_bar(num_prompts: int | None, *, is_shown: bool | None) -> Iterator[Callable[[Output], None]]:
    """What to call with each output. `num_prompts` None: nobody knows; `is_shown` None: on a terminal."""
    if not _is_shown(is_shown):
        yield lambda _: None
        return
    from rich.console import Console  # here: it takes 50 ms, and a batch job has no terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    with Progress(TextColumn("prompts"), *columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=num_prompts, rate="")
        started_s, num_tokens = time.monotonic(), 0

        def show(output: Output) -> None:
            nonlocal num_tokens
            num_tokens += output.usage.completion_tokens
            rate = num_tokens / max(time.monotonic() - started_s, 1e-9)
            bars.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

        yield show


def _is_shown(is_shown: bool | None) -> bool:
    return sys.stderr.isatty() if is_shown is None else is_shown
