"""`k2dist serve`: a cluster that runs until it is told to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from k2dist.cli.environment import ray_address
from k2dist.cli.launch import launched
from k2dist.cli.prepare import prepare_world
from k2dist.cli.progress import start_progress
from k2dist.cluster.start import Cluster
from k2dist.cluster.status import ClusterStatus
from k2dist.cluster.world import World
from k2dist.config.load import load_cluster
from k2dist.errors import UnavailableError


def serve(
    config: Annotated[Path, typer.Argument(help="Cluster YAML; see cluster_configs/.")],
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default: the config's, else the demo's.")
    ] = None,
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT to listen on; default: the config's.")] = None,
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT of the HTTP gateway; default: the config's.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Let it listen beyond this machine, without keys.")] = False,
    detach: Annotated[bool, typer.Option(help="Return once it serves; `k2dist stop` ends it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it serves as one JSON object.")] = False,
) -> None:
    """Bring a cluster up and keep it up: until Ctrl-C, or detached."""
    world = prepare_world(
        load_cluster(config),
        model,
        grpc,
        http,
        is_insecure=insecure,
        is_here=ray_address() is None,
    )
    progress = start_progress(is_quiet=as_json)
    try:
        with launched(world, progress, is_detached=detach) as (cluster, status):
            typer.echo(_as_json(world, status) if as_json else _as_text(world, status, is_detached=detach))
            sys.stdout.flush()
            cluster.is_left_running = detach
            if not detach:
                _watch(cluster)
    except KeyboardInterrupt:
        typer.echo("ended before it served.", err=True)
        raise typer.Exit(130) from None


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


def _as_text(world: World, status: ClusterStatus, *, is_detached: bool) -> str:
    parallel = world.config.parallel
    layout = f"{parallel.lanes} lanes x tp {parallel.tp}, {world.layout.world_size} ranks"
    end = f"`k2dist stop --name {world.config.name}` ends it." if is_detached else "Ctrl-C ends it."
    scheme = "https" if world.config.service.tls.is_on else "http"
    where = f"{status.address} (gRPC)" + (f" and {scheme}://{status.http}" if status.http else "")
    return f"{world.config.name} serves {world.model_dir} at {where} ({layout}). {end}"


def _as_json(world: World, status: ClusterStatus) -> str:
    shown = {
        "cluster": world.config.name,
        "model": world.model_dir,
        "address": status.address,
        "http": status.http,
        "ranks": status.ranks,
    }
    return msgspec.json.encode(shown).decode()
