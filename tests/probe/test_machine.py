"""This machine as it is: facts that can be had another way agree."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from k2dist.doctor.facts import Port, Rdma
from k2dist.probe import Wanted, gather_here, machine
from k2dist.probe.disk import READERS, cached_share, evict, measure_disk
from k2dist.probe.interfaces import find_nics, find_rdma
from k2dist.probe.machine import node_facts


def test_facts_of_this_machine() -> None:
    facts = node_facts("here", Wanted())
    assert facts.node == "here"
    assert facts.num_cores == os.cpu_count()
    assert 0 < facts.free_bytes <= facts.memory_bytes <= psutil.virtual_memory().total
    assert facts.shm_bytes == shutil.disk_usage("/dev/shm").total
    assert facts.versions.torch
    assert facts.versions.ray
    assert len(facts.versions.k2dist_code) == len(facts.versions.kernels_code) == 12
    assert facts.model is None


def test_a_container_has_no_more_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("max", "1000000000"),
        ("current", "700000000"),
        ("stat", "inactive_file 300000000\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(
        machine, "_CGROUPS", (tuple(str(tmp_path / name) for name in ("max", "current", "stat")),)
    )
    facts = node_facts("here", Wanted())
    assert (facts.memory_bytes, facts.free_bytes) == (10**9, 6 * 10**8)


def test_interfaces_have_the_loopback() -> None:
    (loopback,) = [nic for nic in find_nics() if "127.0.0.1" in nic.addresses]
    assert loopback.is_loopback
    assert loopback.mtu > 1000


def test_rdma_ports_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert find_rdma(tmp_path) == (Rdma(name="mlx5_0/1", state="ACTIVE", rate="400 Gb/sec"),)
    assert find_rdma(tmp_path / "none") == ()


def test_a_model_is_there_or_is_said_to_lack_something(tmp_path: Path, tiny_model_dir: Path) -> None:
    whole = node_facts("here", Wanted(model_dir=str(tiny_model_dir))).model
    assert whole is not None
    assert (whole.reason, len(whole.digest)) == ("", 12)
    assert whole.num_bytes == sum(path.stat().st_size for path in tiny_model_dir.glob("*.safetensors"))
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_dir, copy)
    (copy / "model.safetensors.index.json").write_text(
        (copy / "model.safetensors.index.json").read_text() + " "
    )
    changed = node_facts("here", Wanted(model_dir=str(copy))).model
    assert changed is not None
    assert changed.digest != whole.digest
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.unlink()
    lacking = node_facts("here", Wanted(model_dir=str(copy))).model
    assert lacking is not None
    assert f"files missing, {shard.name} first" in lacking.reason
    absent = node_facts("here", Wanted(model_dir=str(tmp_path / "no"))).model
    assert absent is not None
    assert absent.reason == f"{tmp_path}/no: no such directory"


def test_a_port_in_use_has_a_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        used = Port(field="service.grpc", address=f"127.0.0.1:{other.getsockname()[1]}")
        foreign = Port(field="service.http", address="203.0.113.7:8000")
        free = Port(field="service.http", address="127.0.0.1:0")
        found = node_facts("here", Wanted(ports=(used, foreign, free))).ports
    assert [port.reason for port in found] == [
        "Address already in use",
        "Cannot assign requested address",
        "",
    ]


def test_a_disk_is_read_once_and_whole(tmp_path: Path) -> None:
    sizes = [3, 20 * 2**20 + 5, 2**20]
    paths = [tmp_path / str(i) for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(b"k" * size)
    for reader in READERS:
        rate = measure_disk(paths, reader)
        assert rate.num_bytes == sum(sizes)
        assert rate.how in ("direct", "cold")
    assert measure_disk(paths, max_bytes=2**20).num_bytes == 3 + 16 * 2**20  # to the end of a piece


def test_evicted_files_are_not_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"k" * 2**20)
        os.fsync(file.fileno())
    path.read_bytes()
    assert cached_share([path]) == 1.0
    evict([path])
    if cached_share([path]) == 1.0:
        pytest.skip("a file system in memory keeps what it has")
    assert cached_share([path]) == 0.0


def test_all_of_this_machine_with_its_loopback_measured() -> None:
    facts = gather_here(Wanted(), with_links=True)
    (link,) = facts.links
    assert link.nodes == (facts.driver, facts.driver)
    assert link.reason == ""
    assert link.latency_s is not None
    assert link.bytes_per_s is not None
    assert 0 < link.latency_s < 1
    assert link.bytes_per_s > 0
    assert [node.node for node in facts.nodes] == [facts.driver]
    assert facts.ray_nodes is None
