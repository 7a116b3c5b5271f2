"""`k2dist bench load`: cold reads of a model beside its disk, and a cluster's time to ready by stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2dist.cli.bar import counting_bar
from k2dist.cli.here import ConfigArgument, ModelOption, refuse_joined_ray, world_here
from k2dist.cli.shown import JsonOption, print_json
from k2dist.demo import LAPTOP_CONFIG
from k2dist.observe.readiness import Readiness, StageClock

if TYPE_CHECKING:
    from k2dist.bench.load import LoadRates
    from k2dist.cluster.world import World


def load(
    config: ConfigArgument = LAPTOP_CONFIG,
    model: ModelOption = None,
    rounds: Annotated[int, typer.Option(help="Cold reads, of the disk and of the ranks each.", min=1)] = 3,
    start: Annotated[bool, typer.Option(help="Bring a cluster up too, from a cold cache.")] = True,
    as_json: JsonOption = False,
) -> None:
    """How near all ranks' reads come to the disk, with the page cache emptied of the model before each."""
    # With ray and torch: not for others.
    from k2dist.bench.load import measure, num_reads
    from k2dist.config import read_architecture
    from k2dist.parallel import shard_plans

    if start:
        refuse_joined_ray("unset it, or add --no-start")
    world = world_here(config, model)
    model_dir = Path(world.model_dir)
    plans = list(shard_plans(read_architecture(model_dir), world.layout))
    with counting_bar("cold reads", num_reads(rounds), is_quiet=as_json) as note:
        rates = measure(model_dir, plans, num_rounds=rounds, note=note)
    ready = _start(world) if start else None
    if as_json:
        found = {"load": rates, "disk_bytes_per_s": rates.disk_bytes_per_s, "share": rates.share}
        print_json(found | {"ready": ready})
    else:
        typer.echo(_as_text(rates))
        if ready is not None:
            typer.echo(f"from a cold cache, {ready}")


def _start(world: World) -> Readiness:
    """A cluster brought up, and ended."""
    from k2dist.cli.launch import launched
    from k2dist.cli.progress import start_progress
    from k2dist.probe.disk import evict

    evict(sorted(Path(world.model_dir).glob("*.safetensors")))
    clock = StageClock(time.monotonic())
    with launched(world, start_progress(is_quiet=True), is_detached=False, is_examined=True, clock=clock) as (
        _,
        status,
    ):
        return clock.end(time.monotonic(), [rank.progress for rank in status.ranks])


def _as_text(rates: LoadRates) -> str:
    return (
        f"{rates.model}: {_gb(rates.file_bytes)} in files; page cache emptied of them by posix_fadvise, "
        f"{rates.cached_share:.0%} stayed\n"
        f"the disk: {_gb(rates.ceiling_bytes_per_s)}/s ({rates.ceiling_how} reads, {rates.ceiling_reader}; "
        f"best of {rates.num_rounds} rounds)\n"
        f"{rates.num_ranks} ranks at once: {_gb(rates.num_bytes)}, of which {_gb(rates.disk_bytes)} from the "
        f"disk, in {rates.wall_s:.2f} s = {_gb(rates.disk_bytes_per_s)}/s, {rates.share:.0%} of the disk; "
        f"index and headers before that {rates.find_s:.2f} s"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
