"""`k2dist plan`: what a cluster holds, survives, takes to start and gives, before anything is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from k2dist.cli.plan_search import search_layouts
from k2dist.cli.plan_simulate import Asked, run_simulation
from k2dist.cli.plan_view import plan_lines
from k2dist.config import KIMI_K2, find_architecture
from k2dist.config.load import load_cluster
from k2dist.demo import MODEL_DIR
from k2dist.errors import UsageError
from k2dist.planner import ASSUMED, Workload, fitting_workload, plan_cluster


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="Cluster YAML; see cluster_configs/. Or --search.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Model directory or name; default: the config's, else {KIMI_K2}, or the demo's on CPUs."
        ),
    ] = None,
    prompt_len: Annotated[int | None, typer.Option(help="Tokens of a prompt; default: 2000.", min=1)] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens of an answer; default: 500.", min=1)] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests under way; default: as many as run at once.", min=1)
    ] = None,
    target_tpot: Annotated[
        float | None,
        typer.Option(help="Milliseconds that a token may take; fewer run at once, then.", min=0.1),
    ] = None,
    disk_gb_s: Annotated[
        float, typer.Option(help="What one node reads of the checkpoint, GB a second.", min=0.001)
    ] = ASSUMED.disk_rate / 1e9,
    is_search: Annotated[
        bool, typer.Option("--search", help="Rank the layouts of --hardware, in place of a config.")
    ] = False,
    hardware: Annotated[str | None, typer.Option(help="With --search: h200, b200, ...")] = None,
    nodes: Annotated[int, typer.Option(help="With --search: at most so many.", min=1)] = 2,
    gpus: Annotated[
        int | None, typer.Option(help="With --search: of a node; default: as usual.", min=1)
    ] = None,
    write: Annotated[Path | None, typer.Option(help="With --search: a new file for the best config.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--simulate", help="Simulate this trace; planner/arrivals.py says its form."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Simulate so many requests a second.", min=1e-6)] = None,
    requests: Annotated[
        int | None,
        typer.Option(help="Simulate so many; without --rate always --concurrency of them at once.", min=1),
    ] = None,
    shared: Annotated[
        float, typer.Option(help="Of each simulated prompt, what 16 groups have in common.", min=0, max=0.99)
    ] = 0.0,
    sigma: Annotated[
        float, typer.Option(help="Spread of simulated lengths: of their logarithm.", min=0, max=3)
    ] = 0.5,
    skew: Annotated[
        float | None,
        typer.Option(help="Simulate experts wanted in proportion to 1 / place^skew.", min=0, max=4),
    ] = None,
    lose: Annotated[str | None, typer.Option(help="RANK@SECONDS: a simulated rank dies then.")] = None,
    plot: Annotated[Path | None, typer.Option(help="HTML or SVG file for the simulation's curves.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a cluster: memory, losses, start, bytes on the wire, tokens a second. Refuses what cannot work."""
    workload = _workload(prompt_len, output_len, concurrency, target_tpot)
    assumed = msgspec.structs.replace(ASSUMED, disk_rate=disk_gb_s * 1e9)
    if is_search:
        architecture = find_architecture(model or KIMI_K2)
        search_layouts(architecture, hardware, nodes, gpus, workload, assumed, write, as_json=as_json)
        return
    if hardware is not None or write is not None:
        raise UsageError("--hardware and --write belong to --search: add it, and leave out the config")
    if config is None:
        raise UsageError("give a cluster YAML, or --search with --hardware, --nodes and --gpus")
    cluster = load_cluster(config)
    model = model or cluster.model or (KIMI_K2 if cluster.ranks.rank_gpus else str(MODEL_DIR))
    architecture = find_architecture(model)
    if prompt_len is None and output_len is None:
        workload = fitting_workload(cluster, architecture, workload)
    planned = plan_cluster(cluster, model, architecture, workload, assumed=assumed)
    is_simulated = trace is not None or rate is not None or requests is not None
    if not is_simulated and (lose is not None or plot is not None or skew is not None):
        raise UsageError(
            "--lose, --plot and --skew are of a simulation: add --simulate, --rate or --requests"
        )
    if is_simulated:
        asked = Asked(
            trace=trace,
            rate=rate,
            requests=requests,
            shared=shared,
            sigma=sigma,
            skew=skew,
            lose=lose,
            plot=plot,
        )
        run_simulation(cluster, architecture, planned, workload, asked, as_json=as_json)
        return
    typer.echo(msgspec.json.encode(planned).decode() if as_json else "\n".join(plan_lines(planned)))


def _workload(
    prompt_len: int | None, output_len: int | None, concurrency: int | None, target_tpot: float | None
) -> Workload:
    default = Workload()
    return Workload(
        prompt_len=prompt_len or default.prompt_len,
        output_len=output_len or default.output_len,
        concurrency=concurrency,
        target_tpot_s=None if target_tpot is None else target_tpot / 1e3,
    )
