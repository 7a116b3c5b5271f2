"""`k2dist rehearse`: one device acts out one rank of a cluster, to check its plan before it is rented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.bar import counting_bar
from k2dist.cli.shown import JsonOption, figures, print_json
from k2dist.config import KIMI_K2, find_architecture
from k2dist.config.load import load_cluster
from k2dist.errors import UsageError
from k2dist.parallel import configured_layout
from k2dist.planner.memory import GB, gb

_WIDTH = 100  # of the widest table; where there is no terminal rich takes 80

if TYPE_CHECKING:  # with torch
    from rich.table import Table

    from k2dist.rehearsal.report import PartTime, RehearsalReport


def rehearse(
    config: Annotated[Path, typer.Argument(help="Cluster YAML; see cluster_configs/.")],
    model: Annotated[
        str | None,
        typer.Option(help=f"Model directory or name, of which only the config is read; default: {KIMI_K2}."),
    ] = None,
    rank: Annotated[int, typer.Option(help="World rank to act out.")] = 0,
    layers: Annotated[
        int | None, typer.Option(help="Rehearse the first so many, and scale up; default: what fits.")
    ] = None,
    decode: Annotated[int, typer.Option(help="Sequences that decode in each lane.")] = 8,
    context: Annotated[int, typer.Option(help="Keys that each of them sees.")] = 1024,
    prompt_tokens: Annotated[int, typer.Option(help="Rows of a new prompt in each lane's every step.")] = 0,
    skew: Annotated[
        float, typer.Option(help="Load of the experts: the p-th most wanted in proportion to 1 / p^skew.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="How many are timed.")] = 5,
    kernels: Annotated[str | None, typer.Option(help="Default: the config's.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: a GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Act out one rank of a cluster here, with made-up weights and peers, and time its parts.

    Links and waiting for other ranks are not part of any figure.
    """
    # With torch: not for `stop` and `chat`.
    from k2dist.rehearsal.load import Load
    from k2dist.rehearsal.measure import WARM_STEPS, Rehearsal, check_rehearsal, fit, num_notes, run

    cluster = load_cluster(config)
    model = model or cluster.model or KIMI_K2
    architecture = find_architecture(model)
    layout = configured_layout(architecture, cluster.parallel)
    load = Load(
        decode=decode,
        context=context,
        prompt_tokens=prompt_tokens,
        num_steps=steps + WARM_STEPS,
        skew=skew,
    )
    rehearsal = Rehearsal(
        cluster=cluster,
        model=model,
        world_rank=rank,
        load=load,
        kernels=kernels or cluster.kernels,
        device=_device(device),
        layers=layers,
    )
    check_rehearsal(rehearsal, architecture, layout)
    fitted = fit(rehearsal, architecture, layout)
    total = num_notes(rehearsal, fitted.num_layers)
    with counting_bar("ceilings, layers, steps", total, is_quiet=as_json) as note:
        report = run(rehearsal, architecture, layout, fitted, note=note)
    if as_json:
        print_json(report)
    else:
        _print(report, Console(width=max(Console().width, _WIDTH), soft_wrap=True))


def _device(asked: str | None) -> str:
    import torch

    if asked not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {asked}: use cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _print(report: RehearsalReport, console: Console) -> None:
    for line in _heading(report):
        console.print(line, highlight=False)
    console.print(_parts(report))
    for line in (*_exchanged(report), *_rates(report)):
        console.print(line, highlight=False)
    console.print(_memory(report))
    console.print(_plan_line(report), highlight=False)


def _heading(report: RehearsalReport) -> Iterator[str]:
    r = report
    place = "experts only" if r.lane is None else f"lane {r.lane}, tp rank {r.tp_rank}"
    yield (
        f"{r.model}, rank {r.world_rank} of {r.world_size} ({place}) of {r.cluster}: "
        f"{r.num_lanes} lanes x tp {r.tp}"
    )
    yield f"{r.device}, {r.num_threads} threads, {r.kernels}; parts by {r.clock}"
    load = r.load
    yield (
        f"each lane: {load.decode} sequences decode at {load.context:,} keys, {load.prompt_tokens:,} prompt "
        f"rows; expert skew {load.skew:g}; medians of {r.num_timed} steps"
    )
    if r.num_layers < r.of_layers:
        yield (
            f"{r.num_layers} of {r.of_layers} layers ran, in {r.measured_ms:,.1f} ms "
            f"(whole steps: {r.measured_ms_min:,.1f} to {r.measured_ms_max:,.1f}); below, parts are scaled up"
        )


def _parts(report: RehearsalReport) -> Table:
    table = figures("part", "layers run", "ms a step", "share", "floor ms", "of the roofline")
    for part in report.parts:
        if part.layers and part.ms:
            table.add_row(*_part_cells(part, report.step_ms))
    floor_ms = sum(part.floor_ms or 0.0 for part in report.parts)
    table.add_row(
        "a step", "", f"{report.step_ms:,.2f}", "", f"{floor_ms:,.2f}", _percent(floor_ms / report.step_ms)
    )
    return table


def _part_cells(part: PartTime, step_ms: float) -> tuple[str, ...]:
    return (
        str(part.part),
        f"{part.layers} of {part.of_layers}" if part.of_layers > 1 else "",
        f"{part.ms:,.2f}",
        _percent(part.ms / step_ms),
        "-" if part.floor_ms is None else f"{part.floor_ms:,.2f}",
        "-" if part.floor_share is None else _percent(part.floor_share),
    )


def _exchanged(report: RehearsalReport) -> Iterator[str]:
    moved = report.exchanged
    if moved is None:
        return
    yield (
        f"experts, a layer: {moved.rows_arrived:,.0f} rows arrive, {moved.pairs:,.0f} pairs for "
        f"{moved.slots_hit:.1f} of {moved.slots} slots"
    )
    yield (
        f"other ranks, a step: {moved.bytes_sent / 1e6:,.2f} MB to them, "
        f"{moved.bytes_received / 1e6:,.2f} MB from them; making these up took {report.aside_ms:,.1f} ms, "
        f"which is in no figure"
    )


def _rates(report: RehearsalReport) -> Iterator[str]:
    c = report.ceilings
    float8 = f", float8 taken as {c.e4m3_factor * c.bfloat16_tflop_s:,.3f}" if c.e4m3_factor != 1.0 else ""
    yield (
        f"ceilings here: read {c.read_gb_s:,.1f} GB/s, copy {c.copy_gb_s:,.1f} GB/s, bfloat16 "
        f"{c.bfloat16_tflop_s:,.3f} TFLOP/s{float8}"
    )
    yield (
        f"{report.world_size} such ranks, in compute alone: {report.decode_tokens_per_s:,.1f} tokens/s "
        f"decoded, {report.prompt_tokens_per_s:,.1f} prompt tokens/s; links, and waiting for slower ranks, "
        f"are not in it"
    )


def _memory(report: RehearsalReport) -> Table:
    table = figures(f"memory, {report.num_layers} layers", "planned", "held")
    for line in report.memory:
        table.add_row(line.name, _size(line.planned), "not known" if line.held is None else _size(line.held))
    return table


def _plan_line(report: RehearsalReport) -> str:
    of_device = "" if report.device_bytes is None else f" of {gb(report.device_bytes)}"
    return (
        f"planned for this rank with all {report.of_layers} layers, its reserve, and the config's pages and "
        f"steps: {gb(report.whole_rank_bytes)}{of_device}"
    )


def _size(num_bytes: int) -> str:
    return gb(num_bytes) if num_bytes >= GB else f"{num_bytes / 1e6:,.2f} MB"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
