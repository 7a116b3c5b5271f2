"""Notes of running clusters: written whole, read back, forgotten."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from k2dist.cluster.process_mark import ProcessMark, mark_process
from k2dist.cluster.ray_host import HostProcess
from k2dist.cluster.record import ClusterRecord, read_record, remove_record, running_names, write_record
from k2dist.errors import ConfigError

GONE = ProcessMark(pid=os.getpid(), created_s=1.25)  # a process that had this one's pid before it
HOST = HostProcess(address="10.0.0.1:6379", log_dir="/logs", mark=GONE)
RECORD = ClusterRecord(
    name="a", ray_address="10.0.0.1:6379", grpc="127.0.0.1:50051", http="", host=None, driver=mark_process()
)


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    write_record(tmp_path / "new", RECORD)
    assert read_record(tmp_path / "new", "a") == RECORD
    assert running_names(tmp_path / "new") == ["a"]
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "a.json"]


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path, "a") is None
    assert running_names(tmp_path / "nosuch") == []
    remove_record(tmp_path, "a")


def test_a_removed_record_is_gone(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    remove_record(tmp_path, "a")
    assert read_record(tmp_path, "a") is None


def test_a_record_of_another_version_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "a"}')
    with pytest.raises(ConfigError, match=r"a\.json: .*remove it"):
        read_record(tmp_path, "a")


def test_clusters_whose_processes_are_gone_are_forgotten(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    write_record(tmp_path, replace(RECORD, name="b", driver=GONE))
    write_record(tmp_path, replace(RECORD, name="c", driver=None, host=HOST))
    write_record(tmp_path, replace(RECORD, name="d", driver=None))
    assert running_names(tmp_path) == ["a", "d"]
    assert read_record(tmp_path, "b") is None
