"""Which clusters this user runs on this machine: a small file each, by which `k2dist stop` finds them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from k2dist.cluster.process_mark import ProcessMark, find_process
from k2dist.cluster.ray_host import HostProcess
from k2dist.errors import ConfigError
from k2dist.messages import Message


class ClusterRecord(Message, frozen=True, kw_only=True):
    """One cluster. `host`: its own Ray, if it has one; `driver`: who holds its lease, if anybody does."""

    name: str
    ray_address: str
    grpc: str
    http: str  # empty: it has no gateway
    host: HostProcess | None
    driver: ProcessMark | None

    @property
    def is_detached(self) -> bool:
        """Nobody ends it but `k2dist stop`."""
        return self.driver is None

    def is_running(self) -> bool | None:
        """Whether what it depends on lives. None: detached in another's Ray, and only that could tell."""
        held_by = self.host.mark if self.host is not None else self.driver
        return None if held_by is None else find_process(held_by) is not None


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


def running_names(directory: Path) -> list[str]:
    """Names of the recorded clusters that may still run; records of the others are removed."""
    names = sorted(path.stem for path in directory.glob("*.json"))
    for name in names:
        record = read_record(directory, name)
        if record is not None and record.is_running() is False:
            remove_record(directory, name)
    return [name for name in names if _path(directory, name).exists()]


def _path(directory: Path, name: str) -> Path:
    return directory / f"{name}.json"
