"""Which clusters this user runs on this machine: a small file each, by which `k2dist stop` finds them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from k2dist.cluster.ray_host import HostProcess
from k2dist.errors import ConfigError
from k2dist.messages import Message


class ClusterRecord(Message, frozen=True, kw_only=True):
    """One cluster. `host`: its own Ray, if it has one; `is_detached`: nobody ends that but `k2dist stop`."""

    name: str
    ray_address: str
    grpc: str
    is_detached: bool
    host: HostProcess | None


def write_record(directory: Path, record: ClusterRecord) -> None:
    """Replaces an older record of the same name."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = directory / f"{record.name}.{os.getpid()}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    part.replace(_path(directory, record.name))


def read_record(directory: Path, name: str) -> ClusterRecord | None:
    path = _path(directory, name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClusterRecord)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}; it is not of this k2dist, so remove it") from error


def remove_record(directory: Path, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        _path(directory, name).unlink()


def recorded_names(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.json"))


def _path(directory: Path, name: str) -> Path:
    return directory / f"{name}.json"
