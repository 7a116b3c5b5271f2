"""One thing wrong is one finding, where it is, with who has to do what; nothing wrong is no finding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from k2dist.doctor import ClusterFacts, Finding, Level, Needs, NodeFacts, diagnose, errors_of, warnings_of
from k2dist.doctor.facts import Clock, Limits, ModelOnNode, Port, Rdma, Silent
from k2dist.doctor.pairings import rounds
from tests.doctor.machines import (
    CPU_NEEDS,
    GB,
    GPU_NEEDS,
    VERSIONS,
    cluster,
    cpu_node,
    gpu,
    gpu_node,
    link,
    nic,
    ray_node,
)


def bad(findings: Sequence[Finding]) -> list[Finding]:
    return [*errors_of(findings), *warnings_of(findings)]


@pytest.mark.parametrize("needs", [None, CPU_NEEDS])
def test_nothing_wrong_is_no_finding(needs: Needs | None) -> None:
    assert bad(diagnose(cluster(), needs)) == []


def test_nothing_wrong_with_gpus_is_no_finding() -> None:
    facts = cluster(gpu_node("10.0.0.1", num_cores=96), gpu_node("10.0.0.2", num_cores=96))
    assert bad(diagnose(facts, GPU_NEEDS)) == []


def test_what_is_right_is_said_too() -> None:
    said = {finding.check for finding in diagnose(cluster(), CPU_NEEDS)}
    assert said >= {
        "machine",
        "gpus",
        "memory",
        "/dev/shm",
        "limits",
        "clock",
        "model",
        "versions",
        "network",
    }
    assert said >= {"link gloo", "ray"}


SECOND = "10.0.0.2"
MODEL = ModelOnNode(digest="cccc", num_bytes=4 * GB, filesystem="nfs4", read_bytes_per_s=2e9)

# What is changed on the second of two CPU nodes -> check, level, words of what and remedy.
NODE_FAULTS: dict[str, tuple[dict[str, object], str, Level, str, str]] = {
    "no torch": (
        {"versions": replace(VERSIONS, torch="")},
        "machine",
        Level.ERROR,
        "torch absent",
        "install k2dist",
    ),
    "memory": (
        {"free_bytes": 3 * GB},
        "memory",
        Level.ERROR,
        "2 ranks x 2.00 GB = 4.00 GB",
        "lower cache.num_pages",
    ),
    "little memory": (
        {"free_bytes": 4.2 * GB},
        "memory",
        Level.WARNING,
        "4.20 GB free",
        "lower cache.num_pages",
    ),
    "shm": (
        {"shm_bytes": 64 * 2**20, "shm_free_bytes": 64 * 2**20},
        "/dev/shm",
        Level.ERROR,
        "a container's default",
        "medium: Memory",
    ),
    "open files": (
        {"limits": Limits(num_files=1024, num_files_max=4096, memlock_bytes=None)},
        "limits",
        Level.ERROR,
        "1,024 open files (it may raise that to 4,096), about 1,088",
        "ulimit -n 65536",
    ),
    "clock": (
        {"clock": Clock(offset_s=-3.0, error_s=0.01)},
        "clock",
        Level.WARNING,
        "-3000.0 ms",
        "NTP",
    ),
    "no model": (
        {"model": ModelOnNode(reason="/models/k2: no such directory")},
        "model",
        Level.ERROR,
        "no such directory",
        "same path",
    ),
    "slow disk": (
        {"model": replace(MODEL, read_bytes_per_s=2e6)},
        "model",
        Level.WARNING,
        "2 ranks x 1.00 GB in 1,000 s",
        "local NVMe",
    ),
    "too slow a disk": (
        {"model": replace(MODEL, read_bytes_per_s=5e5)},
        "model",
        Level.ERROR,
        "in 4,000 s",
        "deadlines.load_s=3600",
    ),
    "a port": (
        {"ports": (Port(field="service.grpc", address="0.0.0.0:50051", reason="Address already in use"),)},
        "ports",
        Level.ERROR,
        "service.grpc=0.0.0.0:50051: cannot listen there (Address already in use)",
        "k2dist stop",
    ),
    "no interface": (
        {"nics": (nic(address="192.168.0.2"),)},
        "network",
        Level.ERROR,
        "no interface there has 10.0.0.2 (eth0 192.168.0.2)",
        "--node-ip-address",
    ),
    "interface down": (
        {"nics": (nic(address=SECOND, is_up=False),)},
        "network",
        Level.ERROR,
        "it is down",
        "bring it up",
    ),
    "a faster interface": (
        {"nics": (nic(address=SECOND, mbit_per_s=1000), nic("ib0", "10.1.0.2", mbit_per_s=400000))},
        "network",
        Level.WARNING,
        "eth0 (10.0.0.2), mtu 1500, 1 Gbit/s; ib0 has 400 Gbit/s",
        "--node-ip-address 10.1.0.2",
    ),
    "a named interface": (
        {"settings": {"GLOO_SOCKET_IFNAME": "eth"}},
        "network",
        Level.ERROR,
        "GLOO_SOCKET_IFNAME=eth, and there is no such interface (eth0, lo)",
        "unset it",
    ),
    "mtu": (
        {"nics": (nic(address=SECOND, mtu=9000),)},
        "network",
        Level.WARNING,
        "mtu 1500 on 10.0.0.1 and mtu 9000 on 10.0.0.2",
        "one mtu",
    ),
    "another torch": (
        {"versions": replace(VERSIONS, torch="2.12.0")},
        "versions",
        Level.ERROR,
        "torch 2.13.0 on 10.0.0.1, 2.12.0 on 10.0.0.2",
        "one image",
    ),
    "other kernels": (
        {"versions": replace(VERSIONS, kernels_code="eeee")},
        "versions",
        Level.ERROR,
        "kernels_code bbbb on 10.0.0.1, eeee on 10.0.0.2",
        "one image",
    ),
    "other instructions": (
        {"instructions": "avx2"},
        "machine",
        Level.WARNING,
        "instructions amx on 10.0.0.1, avx2 on 10.0.0.2",
        "ranks.allow_mix",
    ),
    "another model": (
        {"model": replace(MODEL, digest="dddd")},
        "model",
        Level.ERROR,
        "digest cccc on 10.0.0.1, dddd on 10.0.0.2",
        "copy the same model",
    ),
}


@pytest.mark.parametrize("fault", NODE_FAULTS)
def test_a_fault_of_a_node_is_the_one_finding(fault: str) -> None:
    changes, check, level, what, remedy = NODE_FAULTS[fault]
    (found,) = bad(diagnose(cluster(cpu_node(), cpu_node(SECOND, **changes)), CPU_NEEDS))
    assert (found.check, found.level) == (check, level)
    assert what in found.what
    assert remedy in found.remedy
    assert found.node in ("", SECOND)


GPU_FAULTS: dict[str, tuple[dict[str, object], str, Level, str, str]] = {
    "no GPUs": ({"gpus": (), "rdma": ()}, "gpus", Level.ERROR, "no GPU", "install the driver"),
    "too few": ({"gpus": (gpu(),)}, "gpus", Level.ERROR, "1 GPUs for 8 ranks x 1", "more nodes"),
    "held": (
        {"gpus": (*(gpu(i) for i in range(7)), gpu(7, free_bytes=50 * GB))},
        "gpus",
        Level.ERROR,
        "GPU 7 has 50.00 GB free of 150.00 GB, a rank needs 90.00 GB",
        "nvidia-smi",
    ),
    "reserve": (
        {"gpus": (*(gpu(i) for i in range(7)), gpu(7, free_bytes=95 * GB))},
        "gpus",
        Level.WARNING,
        "GPU 7 has 5.00 GB beyond what is planned",
        "lower cache.num_pages",
    ),
    "split": (
        {"gpus": (*(gpu(i) for i in range(7)), gpu(7, is_split=True))},
        "gpus",
        Level.ERROR,
        "GPU 7 is split by MIG",
        "-mig 0",
    ),
    "ecc": (
        {"gpus": (*(gpu(i) for i in range(7)), gpu(7, num_ecc_errors=3))},
        "gpus",
        Level.ERROR,
        "GPU 7 has had 3 uncorrected",
        "replace it",
    ),
    "driver": (
        {"gpus": tuple(gpu(i, driver="570.1") for i in range(8))},
        "gpus",
        Level.WARNING,
        "driver 550.127.05 on 10.0.0.1, 570.1 on 10.0.0.2",
        "one driver",
    ),
    "another GPU": (
        {"gpus": tuple(gpu(i, name="NVIDIA H100") for i in range(8))},
        "gpus",
        Level.WARNING,
        "NVIDIA H200 on 10.0.0.1, NVIDIA H100 on 10.0.0.2",
        "ranks.allow_mix",
    ),
    "little shm": (
        {"shm_bytes": 512 * 2**20, "shm_free_bytes": 512 * 2**20},
        "/dev/shm",
        Level.WARNING,
        "NCCL wants",
        "--shm-size",
    ),
    "memlock": (
        {"limits": Limits(num_files=65536, num_files_max=65536, memlock_bytes=65536)},
        "limits",
        Level.ERROR,
        "may be locked",
        "IPC_LOCK",
    ),
    "no rdma": ({"rdma": ()}, "rdma", Level.WARNING, "falls back to TCP", "rdma/*"),
    "rdma down": (
        {"rdma": (Rdma(name="mlx5_0/1", state="DOWN", rate="400 Gb/sec"),)},
        "rdma",
        Level.WARNING,
        "1 ports, none active",
        "cables",
    ),
    "rdma off": (
        {"settings": {"NCCL_IB_DISABLE": "1"}},
        "rdma",
        Level.WARNING,
        "NCCL_IB_DISABLE=1",
        "unset it",
    ),
}


@pytest.mark.parametrize("fault", GPU_FAULTS)
def test_a_fault_of_a_gpu_node_is_the_one_finding(fault: str) -> None:
    changes, check, level, what, remedy = GPU_FAULTS[fault]
    first, second = gpu_node(num_cores=96), gpu_node(SECOND, num_cores=96, **changes)
    facts = cluster(first, second)
    if not second.gpus or len(second.gpus) < 8:  # the driver sees less than Ray was told
        facts = replace(facts, ray_nodes=tuple(ray_node(n.node, CPU=96.0, GPU=8.0) for n in (first, second)))
    found = [each for each in bad(diagnose(facts, GPU_NEEDS)) if "Ray counts" not in each.what]
    assert [(each.check, each.level) for each in found] == [(check, level)]
    assert what in found[0].what
    assert remedy in found[0].remedy


def test_a_count_of_rays_that_the_driver_does_not_share_is_a_warning() -> None:
    facts = cluster(gpu_node(num_cores=96), gpu_node(SECOND, num_cores=96, gpus=(gpu(),)))
    nodes = tuple(ray_node(node, CPU=96.0, GPU=8.0) for node in ("10.0.0.1", SECOND))
    (found,) = warnings_of(diagnose(replace(facts, ray_nodes=nodes), GPU_NEEDS))
    assert (found.node, found.what) == (SECOND, "Ray counts 8 GPUs, the driver 1")


def test_a_mix_that_the_config_allows_is_a_warning_and_never_of_k2dist_itself() -> None:
    needs = replace(CPU_NEEDS, allows_mix=True)
    other = cpu_node(SECOND, versions=replace(VERSIONS, torch="2.12.0", k2dist_code="ffff"))
    findings = diagnose(cluster(cpu_node(), other), needs)
    assert [each.what.split()[0] for each in errors_of(findings)] == ["k2dist_code"]
    assert [each.what.split()[0] for each in warnings_of(findings)] == ["torch"]


def test_a_node_without_room_for_a_rank_is_asked_for_no_memory_and_no_gpu() -> None:
    head = cpu_node("10.0.0.9", free_bytes=GB, nics=(nic(address="10.0.0.9", mtu=9000),))
    workers = gpu_node(num_cores=96), gpu_node(SECOND, num_cores=96)
    facts = cluster(head, *workers, links=(link("10.0.0.1", SECOND),))
    nodes = (ray_node("10.0.0.9"), *(ray_node(n.node, CPU=96.0, GPU=8.0) for n in workers))
    assert bad(diagnose(replace(facts, ray_nodes=nodes), GPU_NEEDS)) == []


def test_loopback_is_right_for_one_machine_and_wrong_for_two() -> None:
    needs = replace(CPU_NEEDS, address="127.0.0.1", num_nodes=None)
    one = replace(cluster(cpu_node()), ray_nodes=(ray_node("10.0.0.1", CPU=4.0),))
    assert bad(diagnose(one, needs)) == []
    errors = errors_of(diagnose(cluster(), needs))
    assert [each.node for each in errors] == ["10.0.0.1", SECOND]
    assert all("set network.address: node" in each.remedy for each in errors)


def test_an_exact_or_excluding_interface_name_is_understood() -> None:
    for name in ("=eth0", "eth", "^docker0,lo", "eth0:1"):
        facts = cluster(cpu_node(), cpu_node(SECOND, settings={"NCCL_SOCKET_IFNAME": name}))
        assert bad(diagnose(facts, CPU_NEEDS)) == [], name
    facts = cluster(cpu_node(), cpu_node(SECOND, settings={"NCCL_SOCKET_IFNAME": "=eth"}))
    assert len(errors_of(diagnose(facts, CPU_NEEDS))) == 1


def test_links_are_held_against_each_other() -> None:
    names = ("a", "b", "c", "d")
    pairs = [pair for each in rounds(names) for pair in each]
    links = [link(*pair) for pair in pairs]
    links[2] = replace(links[2], bytes_per_s=2e8)
    links[3] = replace(links[3], latency_s=5e-2)
    links[4] = replace(links[4], latency_s=None, bytes_per_s=None, reason="not complete within 30 s")
    findings = [f for f in diagnose(cluster(links=tuple(links)), None) if f.check == "link gloo"]
    assert [f.level for f in findings] == [
        Level.OK,
        Level.OK,
        Level.WARNING,
        Level.WARNING,
        Level.ERROR,
        Level.OK,
    ]
    assert "0.20 GB/s from each; others do 2.00 GB/s" in findings[2].what
    assert "50.00 ms" in findings[3].what
    assert "not complete within 30 s" in findings[4].what
    assert "firewall" in findings[4].remedy


def test_latency_that_would_fill_a_step_is_said_in_steps() -> None:
    facts = cluster(links=(link("10.0.0.1", SECOND, latency_s=1e-3),))
    (found,) = bad(diagnose(facts, CPU_NEEDS))
    assert "a step has 120 exchanges, so 120 ms of every token are latency" in found.what


def test_a_silent_node_is_an_error() -> None:
    facts = cluster(cpu_node(), silent=(Silent(node=SECOND, reason="did not answer within 20 s"),))
    facts = replace(facts, ray_nodes=tuple(ray_node(node, CPU=2.0) for node in ("10.0.0.1", SECOND)))
    (found,) = bad(diagnose(facts, CPU_NEEDS))
    assert (found.level, found.node, found.what) == (Level.ERROR, SECOND, "did not answer within 20 s")


def test_every_fault_has_a_remedy() -> None:
    nodes: list[NodeFacts] = [cpu_node()]
    nodes += [cpu_node(f"10.0.1.{i}", **fault[0]) for i, fault in enumerate(NODE_FAULTS.values())]
    nodes += [gpu_node(f"10.0.2.{i}", **fault[0]) for i, fault in enumerate(GPU_FAULTS.values())]
    facts: ClusterFacts = cluster(*nodes)
    found = [each for needs in (None, CPU_NEEDS, GPU_NEEDS) for each in bad(diagnose(facts, needs))]
    assert len(found) > 60
    assert [each for each in found if not each.remedy] == []
    assert [each for each in diagnose(facts, GPU_NEEDS) if each.level is Level.OK and each.remedy] == []
