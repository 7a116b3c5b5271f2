"""`k2dist serve`: a cluster that runs until it is told to end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from k2dist.cli.launch import launched
from k2dist.cli.prepare import check_here, prepare_world
from k2dist.cli.progress import start_progress
from k2dist.cluster.start import Cluster
from k2dist.cluster.status import ClusterStatus
from k2dist.cluster.world import World
from k2dist.config.load import load_cluster
from k2dist.errors import UnavailableError, UsageError
from k2dist.observe.readiness import Readiness, StageClock


def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Cluster YAML; see cluster_configs/. `--config PATH` is the same.")
    ] = None,
    config_option: Annotated[Path | None, typer.Option("--config", hidden=True)] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default: the config's, else the demo's.")
    ] = None,
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT to listen on; default: the config's.")] = None,
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT of the HTTP gateway; default: the config's.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Let it listen beyond this machine, without keys.")] = False,
    detach: Annotated[bool, typer.Option(help="Return once it serves; `k2dist stop` ends it.")] = False,
    doctor: Annotated[
        bool, typer.Option(help="Look at the machines first (`k2dist doctor --quick`); errors stop it.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it serves as one JSON object.")] = False,
) -> None:
    """Bring a cluster up and keep it up: until Ctrl-C, or detached."""
    given = load_cluster(_the_one(config, config_option))
    world = prepare_world(given, model, grpc, http, is_insecure=insecure)
    check_here(world.config.service)
    progress = start_progress(is_quiet=as_json)
    clock = StageClock(time.monotonic())
    try:
        with launched(world, progress, is_detached=detach, is_examined=doctor, clock=clock) as (
            cluster,
            status,
        ):
            ready = clock.end(time.monotonic(), [rank.progress for rank in status.ranks])
            text = _as_text(world, status, ready, is_detached=detach)
            typer.echo(_as_json(world, status, ready) if as_json else text)
            sys.stdout.flush()
            cluster.is_left_running = detach
            if not detach:
                _watch(cluster)
    except KeyboardInterrupt:
        typer.echo("ended before it served.", err=True)
        raise typer.Exit(130) from None


def _the_one(argument: Path | None, option: Path | None) -> Path:
    """The config, in whichever of the two places it was given."""
    match argument, option:
        case (Path() as path, None) | (None, Path() as path):
            return path
    raise UsageError("give one cluster YAML: `k2dist serve CONFIG`; see cluster_configs/")


def _watch(cluster: Cluster) -> None:
    """Until the cluster ends, or Ctrl-C. UnavailableError if nobody asked it to."""
    is_ending = False
    try:
        for status in cluster.statuses():
            if status.is_failure:
                raise UnavailableError(cluster.last_words(status))
            if status.has_ended:
                return
            is_ending = bool(status.reason)
    except UnavailableError:
        if not is_ending:  # else whoever ended it was done before the last status came here
            raise
    except KeyboardInterrupt:
        typer.echo("\ndraining; Ctrl-C again ends it at once", err=True)


def _as_text(world: World, status: ClusterStatus, ready: Readiness, *, is_detached: bool) -> str:
    parallel = world.config.parallel
    layout = f"{parallel.lanes} lanes x tp {parallel.tp}, {world.layout.world_size} ranks"
    end = f"`k2dist stop --name {world.config.name}` ends it." if is_detached else "Ctrl-C ends it."
    scheme = "https" if world.config.service.tls.is_on else "http"
    where = f"{status.address} (gRPC)" + (f" and {scheme}://{status.http}" if status.http else "")
    return f"{world.config.name} serves {world.model_dir} at {where} ({layout}). {end}\n{ready}"


def _as_json(world: World, status: ClusterStatus, ready: Readiness) -> str:
    shown = {
        "cluster": world.config.name,
        "model": world.model_dir,
        "address": status.address,
        "http": status.http,
        "ranks": status.ranks,
        "ready": ready,
    }
    return msgspec.json.encode(shown).decode()
