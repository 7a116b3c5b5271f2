"""Machines in which nothing is wrong, for tests to break one thing of."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from k2dist.doctor.facts import (
    Clock,
    ClusterFacts,
    Gpu,
    Limits,
    Link,
    ModelOnNode,
    Nic,
    NodeFacts,
    RayNode,
    Rdma,
    Versions,
)
from k2dist.doctor.needs import Needs

GB = 10**9

VERSIONS = Versions(
    python="3.11.9",
    torch="2.13.0",
    ray="2.60.0",
    triton="3.9.0",
    k2dist="0.1.0",
    k2dist_code="aaaa",
    kernels_code="bbbb",
)
CPU_NEEDS = Needs(
    world_size=4,
    num_nodes=2,
    rank_cpus=1.0,
    rank_gpus=0.0,
    rank_bytes=2 * GB,
    reserve_bytes=GB,
    read_bytes=GB,
    load_s=3600.0,
    num_exchanges=120,
    address="node",
    object_store_bytes=None,
    allows_mix=False,
)
GPU_NEEDS = replace(CPU_NEEDS, world_size=16, rank_gpus=1.0, rank_bytes=90 * GB, reserve_bytes=8 * GB)


def nic(name: str = "eth0", address: str = "10.0.0.1", **changes: Any) -> Nic:
    given = Nic(name=name, addresses=(address,), is_up=True, mtu=1500, mbit_per_s=25000, is_loopback=False)
    return replace(given, **changes)


def gpu(index: int = 0, **changes: Any) -> Gpu:
    given = Gpu(
        index=index,
        name="NVIDIA H200",
        driver="550.127.05",
        capability="9.0",
        memory_bytes=150 * GB,
        free_bytes=149 * GB,
        is_split=False,
        num_ecc_errors=0,
    )
    return replace(given, **changes)


def cpu_node(node: str = "10.0.0.1", **changes: Any) -> NodeFacts:
    given = NodeFacts(
        node=node,
        versions=VERSIONS,
        cpu="Xeon",
        instructions="amx",
        num_cores=2,
        memory_bytes=24 * GB,
        free_bytes=20 * GB,
        shm_bytes=12 * GB,
        shm_free_bytes=12 * GB,
        limits=Limits(num_files=65536, num_files_max=65536, memlock_bytes=8 * 2**20),
        nics=(nic(address=node), nic("lo", "127.0.0.1", is_loopback=True, mtu=65536, mbit_per_s=None)),
        rdma=(),
        gpus=(),
        no_gpus_reason="nvidia-smi: not found",
        settings={},
        clock=Clock(offset_s=0.001, error_s=0.001),
        model=ModelOnNode(digest="cccc", num_bytes=4 * GB, filesystem="ext4", read_bytes_per_s=2e9),
    )
    return replace(given, **changes)


def gpu_node(node: str = "10.0.0.1", **changes: Any) -> NodeFacts:
    given = cpu_node(
        node,
        gpus=tuple(gpu(index) for index in range(8)),
        no_gpus_reason="",
        rdma=tuple(Rdma(name=f"mlx5_{i}/1", state="ACTIVE", rate="400 Gb/sec") for i in range(8)),
        limits=Limits(num_files=65536, num_files_max=65536, memlock_bytes=None),
    )
    return replace(given, **changes)


def ray_node(node: str, **total: float) -> RayNode:
    return RayNode(node=node, total=total, free=total)


def cluster(*nodes: NodeFacts, **changes: Any) -> ClusterFacts:
    """With two CPU nodes unless others are given, and a Ray that counts what they have."""
    nodes = nodes or (cpu_node("10.0.0.1"), cpu_node("10.0.0.2"))
    given = ClusterFacts(
        driver=nodes[0].node,
        nodes=nodes,
        links=(link(*[node.node for node in nodes[:2]]),) if len(nodes) > 1 else (),
        ray_nodes=tuple(ray_node(n.node, CPU=float(n.num_cores), GPU=float(len(n.gpus))) for n in nodes),
    )
    return replace(given, **changes)


def link(*nodes: str, **changes: Any) -> Link:
    return replace(Link(nodes=nodes, transport="gloo", latency_s=2e-4, bytes_per_s=2e9), **changes)
