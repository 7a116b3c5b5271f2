"""`k2dist stop`: end a cluster that another command started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import ray
import typer

from k2dist.cli.environment import ray_address, records_dir
from k2dist.cluster.process_mark import find_process
from k2dist.cluster.ray_host import stop_host
from k2dist.cluster.record import ClusterRecord, read_record, remove_record, running_names
from k2dist.cluster.start import find_cluster, join_ray, sweep
from k2dist.errors import UsageError

_HOST_STOP_S = 10.0


def stop(
    name: Annotated[str | None, typer.Option(help="The cluster; default: the only one there is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was ended as one JSON object.")] = False,
) -> None:
    """End a cluster in order: let it drain, stop its ranks, and the Ray that came with it."""
    directory = records_dir()
    name = name or _only_name(directory)
    record = read_record(directory, name)
    was_running = _end(name, record)
    remove_record(directory, name)
    if not was_running:
        raise UsageError(f"cluster {name!r} is not running")
    typer.echo(msgspec.json.encode({"ended": name}).decode() if as_json else f"{name} has ended.")


def _only_name(directory: Path) -> str:
    names = running_names(directory)
    if len(names) != 1:
        there = f"there are {', '.join(names)}" if names else "none is noted on this machine"
        raise UsageError(f"--name: which cluster? {there}")
    return names[0]


def _end(name: str, record: ClusterRecord | None) -> bool:
    """False if there was nothing to end."""
    address = record.ray_address if record is not None else ray_address()
    if address is None:
        return False
    host = record.host if record is not None else None
    if host is not None and find_process(host.mark) is None:
        return False
    join_ray(address, name)
    try:
        cluster = find_cluster(name)
        if cluster is not None:
            cluster.end("k2dist stop")
        was_running = bool(cluster is not None or sweep(name))
    finally:
        ray.shutdown()
    if host is not None and record is not None and record.is_detached:
        stop_host(host, _HOST_STOP_S)
    return was_running
