"""A cluster that a benchmark starts on this machine, in a Ray of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k2dist.cli.environment import ray_address
from k2dist.errors import UsageError

if TYPE_CHECKING:  # with ray
    from k2dist.cluster.world import World

ConfigArgument = Annotated[
    Path, typer.Argument(help="Cluster YAML; default: the laptop's, as in cluster_configs/.")
]
ModelOption = Annotated[
    Path | None, typer.Option(help="Model directory; default: the config's, else the demo's.")
]


def refuse_joined_ray(remedy: str = "unset it") -> None:
    """UsageError where RAY_ADDRESS is set."""
    if ray_address() is not None:
        raise UsageError(f"RAY_ADDRESS is set, and this needs a Ray of its own; {remedy}")


def world_here(config: Path, model: Path | None) -> World:
    """As `prepare_world`, on free ports."""
    from k2dist.cli.prepare import prepare_world
    from k2dist.config.load import load_cluster

    return prepare_world(load_cluster(config), model, "127.0.0.1:0", "127.0.0.1:0")
