"""How far a batch of prompts is: a bar on a terminal's stderr, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from k2dist.llm.output import Output


@contextmanager
def progress_bar(num_prompts: int | None, *, is_shown: bool | None) -> Iterator[Callable[[Output], None]]:
    """What to call with each output. `num_prompts` None: nobody knows; `is_shown` None: on a terminal."""
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
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
