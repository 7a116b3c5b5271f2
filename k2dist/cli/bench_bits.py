"""`k2dist bench bits`: what the same bits cost, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.bar import bar
from k2dist.cli.shown import JsonOption, figures, print_report
from k2dist.demo import MODEL_DIR

if TYPE_CHECKING:
    from k2dist.bench.bits import BitsCost, BitsReport, OrderCost


def bits(
    model: Annotated[Path, typer.Argument(help="Model directory; default: the demo's model.")] = MODEL_DIR,
    lanes: Annotated[int, typer.Option(help="Lanes; each takes the same step.")] = 2,
    tp: Annotated[int, typer.Option(help="Ranks per lane.")] = 2,
    kernels: Annotated[str, typer.Option(help="The set that keeps the bits.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the residual stream: bfloat16 or float32.")] = "bfloat16",
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Decode rows of each lane; may be repeated. Default: 1, 8, 32.", min=1),
    ] = None,
    prompt_rows: Annotated[int, typer.Option(help="Rows of each lane's prompt chunk.", min=1)] = 256,
    turns: Annotated[int, typer.Option(help="How often each order takes each step.", min=1)] = 15,
    as_json: JsonOption = False,
) -> None:
    """A step that keeps a row's bits beside one in the fastest order: times and bytes, in one run."""
    from k2dist.bench.bits import measure  # with torch: not for others

    with bar("turns", is_quiet=as_json) as show:
        report = measure(
            model,
            lanes=lanes,
            tp=tp,
            kernels=kernels,
            dtype=dtype,
            batches=(1, 8, 32) if batch is None else batch,
            prompt_rows=prompt_rows,
            num_turns=turns,
            show=show,
        )
    print_report("bits", report, _print, as_json=as_json)


def _print(report: BitsReport, console: Console) -> None:
    titles = ("step", "order", "ms", "time", "lane KB", "expert KB", "bytes", "off")
    table = figures(*titles, num_names=2, is_narrow=True)
    for case in report.cases:
        for order in case.orders:
            table.add_row(*_cells(case, order))
        table.add_section()
    console.print(table)
    console.print(
        f"{report.kernels} kernels, {report.dtype}, {report.lanes} lanes of tp {report.tp}, experts over "
        f"{report.num_ranks} ranks; steps with so many rows of each lane, {report.num_turns} turns.\n"
        f"time, bytes: what the same bits take, in what this order takes; more than 1 is their price.\n"
        f"KB: sent by all ranks in a step, for reductions in lanes and to experts and back.\n"
        f"off: a typical row's farthest logit in float32, as a share of its largest.\n"
        f"{_published(report)}",
        soft_wrap=True,
    )


def _published(report: BitsReport) -> str:
    from k2dist.bench.bits import PUBLISHED_RANKS, PUBLISHED_ROWS

    forms = "; ".join(
        f"{found.form} {found.out_bytes / 1e6:.1f} MB out, {found.home_bytes / 1e6:.1f} MB home"
        for found in report.published
    )
    return f"Kimi K2, {PUBLISHED_ROWS} rows of each of {PUBLISHED_RANKS} ranks, a rank and layer: {forms}."


def _cells(case: BitsCost, order: OrderCost) -> tuple[str, ...]:
    kept = case.orders[0]
    num_bytes = order.lane_bytes + order.expert_bytes
    return (
        f"{case.step} {case.num_rows}",
        order.order,
        f"{order.step_ms:.1f}",
        f"x {order.same_bits_ratio:.2f}",
        f"{order.lane_bytes / 1e3:,.0f}",
        f"{order.expert_bytes / 1e3:,.0f}",
        f"x {(kept.lane_bytes + kept.expert_bytes) / num_bytes:.2f}" if num_bytes else "-",
        f"{order.off:.0e}",
    )
