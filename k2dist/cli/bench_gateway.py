"""`k2dist bench gateway`: tokens that coordinator and gateway carry to many streams at once, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.bar import bar
from k2dist.cli.shown import JsonOption, figures, print_report
from k2dist.errors import UsageError

if TYPE_CHECKING:  # with grpc and aiohttp
    from k2dist.bench.gateway import GatewayReport


def gateway(
    over: Annotated[str, typer.Option(help="How the clients read: grpc or sse.")] = "sse",
    streams: Annotated[int, typer.Option(help="At a time; each is asked anew when it ends.", min=1)] = 256,
    cores: Annotated[int, typer.Option(help="For all processes together, the clients' too.", min=1)] = 2,
    pace: Annotated[
        float | None,
        typer.Option(
            help="Tokens a second of all streams. Default: rising, until they are not carried.", min=0.1
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="At each pace. With --pace 600 or so: does memory grow?", min=0.1)
    ] = 4.0,
    as_json: JsonOption = False,
) -> None:
    """What the service carries, one token an event, with a stub in the lane's place; and its memory."""
    from k2dist.bench.gateway import measure  # with grpc and aiohttp: not for others

    if over not in ("grpc", "sse"):
        raise UsageError(f"--over={over}: use grpc or sse")
    with bar("readings" if pace else "paces", is_quiet=as_json) as show:
        report = measure(
            "grpc" if over == "grpc" else "sse",
            num_streams=streams,
            num_cores=cores,
            pace_per_s=pace,
            seconds=seconds,
            show=show,
        )
    print_report("gateway", report, _print, as_json=as_json)


def _print(report: GatewayReport, console: Console) -> None:
    processes = tuple(report.windows[0].us_per_event)
    table = figures(
        "pace/s", "events/s", "tokens an event", *(f"{name} us" for name in processes), num_names=0
    )
    for window in report.windows:
        table.add_row(
            f"{window.pace_per_s:,.0f}",
            f"{window.events_per_s:,.0f}",
            f"{window.tokens_per_event:.2f}",
            *(f"{window.us_per_event[name]:.0f}" for name in processes),
        )
    console.print(table)
    best = report.best
    grown = ", ".join(
        f"{name} {readings[0]:.0f} MB, at the end {readings[-1]:.0f} MB"
        for name, readings in report.rss_mb.items()
    )
    console.print(
        f"{report.num_streams} streams over {report.over} on {report.num_cores} cores: "
        f"{best.events_per_s:,.0f} tokens/s, one in each event"
        f"{'' if best.is_held else '; even this is less than was made'}\n"
        f"us: CPU time of an event. memory at first: {grown}; {report.num_answers:,} answers ended",
        soft_wrap=True,
    )
