"""`k2dist stop`: end a cluster that another command started, or only have it take no new work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import ray
import typer

from k2dist.cli.access import Access, CaOption, CertOption, KeyFileOption, KeyOption, read_access
from k2dist.cli.environment import ray_address, records_dir
from k2dist.cli.shown import print_json
from k2dist.cluster.process_mark import find_process
from k2dist.cluster.ray_host import stop_host
from k2dist.cluster.record import ClusterRecord, read_record, remove_record, running_names
from k2dist.cluster.start import find_cluster, join_ray, sweep
from k2dist.errors import UsageError

_HOST_STOP_S = 10.0


def stop(
    name: Annotated[str | None, typer.Option(help="The cluster; default: the only one there is.")] = None,
    drain: Annotated[
        bool,
        typer.Option(
            "--drain", help="Only that: no new work from now on; wait for the accepted, end nothing."
        ),
    ] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", help="Of --drain, in seconds; default: deadlines.drain_s.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of --drain: the coordinator's HOST:PORT; default: what is noted here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was done as one JSON object.")] = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """End a cluster in order: let it drain, stop its ranks, and the Ray that came with it.

    --drain talks to the coordinator as a client does, with an operator's key where keys are asked for.
    """
    directory = records_dir()
    if drain:
        address = address or _noted_address(directory, name)
        _drain(address, timeout_s, read_access(ca, cert, key, api_key_file), as_json=as_json)
        return
    if timeout_s is not None or address is not None:
        raise UsageError("--timeout and --address: they are for --drain")
    name = name or _only_name(directory)
    record = read_record(directory, name)
    was_running = _end(name, record)
    remove_record(directory, name)
    if not was_running:
        raise UsageError(f"cluster {name!r} is not running")
    if as_json:
        print_json({"ended": name})
    else:
        typer.echo(f"{name} has ended.")


def _drain(address: str, timeout_s: float | None, access: Access, *, as_json: bool) -> None:
    """Exit code 1: some of its outputs go on."""
    from k2dist.service.client import Client  # with grpc: not where a cluster is ended

    with Client(address, tls=access.tls, api_key=access.api_key) as client:
        answer = client.drain(timeout_s)
    if as_json:
        print_json({"drained": answer.is_drained, "live_outputs": answer.live_outputs})
    else:
        state = "it is empty" if answer.is_drained else f"{answer.live_outputs} outputs still go on"
        typer.echo(f"{address} takes no new requests, and {state}. `k2dist stop` ends it.")
    if not answer.is_drained:
        raise typer.Exit(1)


def _noted_address(directory: Path, name: str | None) -> str:
    record = read_record(directory, name or _only_name(directory))
    if record is None:
        raise UsageError(f"--address: where is it? No cluster {name!r} is noted on this machine")
    return record.grpc


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
