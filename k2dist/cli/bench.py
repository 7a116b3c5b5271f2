"""`k2dist bench`: what parts of the system cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec.structs import replace
from rich.console import Console

from k2dist.bench.scheduler import CASES, NUM_STEPS
from k2dist.bench.scheduler import measure as measure_scheduler
from k2dist.cli.bench_tables import print_latency, print_scheduler
from k2dist.cli.environment import ray_address
from k2dist.cli.stage_bar import stage_bar
from k2dist.demo import LAPTOP_CONFIG
from k2dist.errors import UsageError

bench = typer.Typer(help="Measure parts of the system on this machine.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@bench.command()
def scheduler(
    decoding: Annotated[
        list[int] | None, typer.Option(help="Sequences that decode; may be repeated. Default: 64 to 32768.")
    ] = None,
    waiting: Annotated[int, typer.Option(help="Sequences that wait meanwhile; with --decoding.")] = 0,
    steps: Annotated[int, typer.Option(help="How many are timed.")] = NUM_STEPS,
    as_json: AsJson = False,
) -> None:
    """What a lane's first rank spends on planning and committing one step."""
    cases = CASES if decoding is None else [(num_decoding, waiting) for num_decoding in decoding]
    costs = list(measure_scheduler(cases, steps))
    if as_json:
        typer.echo(msgspec.json.encode({"scheduler": costs}).decode())
    else:
        print_scheduler(costs, Console())


@bench.command()
def latency(
    config: Annotated[
        Path, typer.Argument(help="Cluster YAML; default: the laptop's, as in cluster_configs/.")
    ] = LAPTOP_CONFIG,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default: the config's, else the demo's.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each wait.")] = 50,
    window: Annotated[float, typer.Option(help="Seconds of each window of CPU time or of steps.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """What a cluster on this machine costs while idle, and how soon it answers, idle and busy."""
    # With ray and grpc: not for others.
    from k2dist.bench.latency import measure, num_notes
    from k2dist.cli.prepare import prepare_world
    from k2dist.config.load import load_cluster

    if ray_address() is not None:
        raise UsageError("RAY_ADDRESS is set, and this measures a Ray of its own; unset it")
    given = load_cluster(config)
    given = replace(given, service=replace(given.service, http=None))  # a gateway is measured by itself
    world = prepare_world(given, model, "127.0.0.1:0", is_here=True)
    with stage_bar(num_notes(samples), is_quiet=as_json) as (stage, note):
        found = measure(world, num_samples=samples, window_s=window, stage=stage, note=note)
    if as_json:
        typer.echo(msgspec.json.encode({"latency": found}).decode())
    else:
        print_latency(found, Console())
