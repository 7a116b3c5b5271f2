"""`k2dist bench scheduler`: what planning costs, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from k2dist.bench.scheduler import CASES, NUM_STEPS, SchedulerCost, measure
from k2dist.cli.shown import JsonOption, figures, print_report


def scheduler(
    decoding: Annotated[
        list[int] | None,
        typer.Option(help="Sequences that decode; may be repeated. Default: 64 to 32768.", min=1),
    ] = None,
    waiting: Annotated[int, typer.Option(help="Sequences that wait meanwhile; with --decoding.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="How many are timed.", min=1)] = NUM_STEPS,
    as_json: JsonOption = False,
) -> None:
    """What a lane's first rank spends on planning and committing one step."""
    cases = CASES if decoding is None else [(num_decoding, waiting) for num_decoding in decoding]
    costs = list(measure(cases, steps))
    print_report("scheduler", costs, _print, as_json=as_json)


def _print(costs: Sequence[SchedulerCost], console: Console) -> None:
    titles = ("decoding", "waiting", "plan ms", "commit ms", "step ms", "best", "worst", "us/row")
    table = figures(*titles, num_names=0)
    for cost in costs:
        medians = (cost.plan_ms, cost.commit_ms, cost.step_ms)
        table.add_row(
            f"{cost.num_decoding:,}",
            f"{cost.num_waiting:,}",
            *(f"{time_ms:.3f}" for time_ms in medians),
            f"{cost.step_ms_min:.2f}",
            f"{cost.step_ms_max:.2f}",
            f"{cost.row_us:.2f}",
        )
    console.print(table)
    console.print("Medians of wall time; a step is plan and commit; best and worst step.")
