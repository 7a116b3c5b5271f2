"""All that can be found wrong before a process is started: config, model files, layout, ports."""

from __future__ import annotations

import socket
from pathlib import Path

from msgspec.structs import replace

from k2dist.cluster.world import World, plan_world
from k2dist.config import read_architecture
from k2dist.config.cluster import (
    ClusterConfig,
    ServiceConfig,
    exposures,
    faults_between,
    listen_addresses,
    split_address,
)
from k2dist.demo import MODEL_DIR
from k2dist.errors import CapacityError, ConfigError, LayoutError
from k2dist.parallel import shard_plans
from k2dist.planner import Workload, fitting_workload, plan_cluster
from k2dist.service.api_keys import read_keys
from k2dist.service.tls import check_files
from k2dist.text import Tokenizer


def prepare_world(
    config: ClusterConfig,
    model_dir: Path | None,
    grpc: str | None = None,
    http: str | None = None,
    *,
    is_insecure: bool = False,
) -> World:
    """The plan of a cluster, checked. What the command line says wins over the config; if neither names a
    model it is the demo's.

    `is_insecure`: it may listen beyond this machine without keys. Errors: ConfigError, CheckpointError,
    LayoutError, CapacityError.
    """
    said = {name: address for name, address in (("grpc", grpc), ("http", http)) if address is not None}
    config = replace(config, service=replace(config.service, **said))
    faults = list(faults_between(config))
    if not is_insecure:
        faults += exposures(config.service)
    if faults:
        raise ConfigError("\n".join(faults))
    try:
        world = plan_world(config, model_dir or (MODEL_DIR if config.model is None else Path(config.model)))
    except LayoutError as error:
        if model_dir is not None or config.model is not None:
            raise
        raise LayoutError(
            f"{error}\nthat is of the demo's model; name yours: --model DIR, or `model:`"
        ) from error
    architecture = read_architecture(Path(world.model_dir))
    workload = fitting_workload(config, architecture, Workload())
    plan_cluster(
        config, world.model_dir, architecture, workload, layout=world.layout
    )  # refuses what cannot work
    _check_model(world)
    return world


def check_here(service: ServiceConfig) -> None:
    """Its servers will run on this machine: their files must be readable here, and their ports free.

    Errors: ConfigError, CapacityError.
    """
    check_files(service.tls)
    if service.api_keys is not None:
        read_keys(service.api_keys)
    for field, address in listen_addresses(service):
        check_port(address, field)


def check_port(address: str, field: str = "grpc") -> None:
    """CapacityError if nobody could listen there. Another may still come first; then the server says so."""
    parts = split_address(address)
    assert parts is not None, "the config was checked"
    host, port = parts
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections of one that has ended, in TIME_WAIT, are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CapacityError(
                f"service.{field}={address}: cannot listen there ({error.strerror}); is another k2dist "
                f"running? End it with `k2dist stop`, or give another address with --{field}, such as "
                f"127.0.0.1:0"
            ) from error


def _check_model(world: World) -> None:
    """Headers and names of every file against what each rank will read; ranks read the bytes, later."""
    from k2dist.checkpoint import CheckpointFiles  # with torch: not for `stop` and `chat`

    model_dir = Path(world.model_dir)
    architecture = read_architecture(model_dir)
    Tokenizer.load(model_dir)
    with CheckpointFiles(model_dir) as files:
        for plan in shard_plans(architecture, world.layout):
            files.check(plan)
