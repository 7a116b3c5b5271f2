"""One process's part in measuring an all-to-all, over the communicators that serving uses."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING

from k2dist.doctor.facts import Link
from k2dist.errors import ConfigError, PeerError
from k2dist.ids import Generation
from k2dist.messages import Message

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # the stubs do not re-export the stores

    from k2dist.comm import Communicator

JOIN_S = 20.0
CALL_S = 10.0
SMALL_BYTES = 32  # of an agreement
LARGE_BYTES = 16 * 2**20  # to all others together
NUM_SMALL = 50
NUM_LARGE = 6
_LOOPBACK = "127.0.0.1"
_WARM = 2  # calls that are not counted: connections, buffers


class LinkRate(Message, frozen=True, kw_only=True):
    """As one process saw it. `bytes_per_s`: sent by it, while all send. `reason`: why there is neither."""

    latency_s: float | None = None
    bytes_per_s: float | None = None
    reason: str = ""


def measure_link(store: Store, *, name: str, rank: int, size: int, address: str, transport: str) -> LinkRate:
    """Collective over `size` processes, this one `rank`, listening at `address`; each ends within
    `JOIN_S` and a few `CALL_S`. `transport`: gloo, or nccl on this process's first GPU."""
    try:
        comm = _open(store, name, rank, size, address, transport)
        return LinkRate(latency_s=_latency_s(comm, transport), bytes_per_s=_bytes_per_s(comm, transport))
    except (PeerError, ConfigError) as error:
        return LinkRate(reason=str(error))


def measure_here(node: str) -> Link:
    """Between two threads of this process, over its loopback: what this machine itself can do."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store = HashStore()

    def measure(rank: int) -> LinkRate:
        return measure_link(store, name="here", rank=rank, size=2, address=_LOOPBACK, transport="gloo")

    with ThreadPoolExecutor(2) as pool:
        return link_of((node, node), "gloo", list(pool.map(measure, range(2))))


def link_of(nodes: tuple[str, ...], transport: str, rates: Sequence[LinkRate]) -> Link:
    """What all its processes saw: the slowest of each, or the first reason why there is nothing."""
    reasons = [rate.reason for rate in rates if rate.reason]
    if reasons:
        return Link(nodes=nodes, transport=transport, reason=reasons[0])
    return Link(
        nodes=nodes,
        transport=transport,
        latency_s=max(rate.latency_s for rate in rates if rate.latency_s is not None),
        bytes_per_s=min(rate.bytes_per_s for rate in rates if rate.bytes_per_s is not None),
    )


def _open(store: Store, name: str, rank: int, size: int, address: str, transport: str) -> Communicator:
    import torch

    from k2dist.comm import DistCommunicator, NcclCommunicator
    from k2dist.comm.nccl import ENVIRONMENT

    generation, members = Generation(0), tuple(range(size))
    if transport == "nccl":
        for variable, value in ENVIRONMENT.items():
            os.environ[variable] = value
        return NcclCommunicator(
            store,
            generation=generation,
            name=name,
            members=members,
            world_rank=rank,
            device=torch.device("cuda", 0),
            deadline_s=CALL_S,
            join_deadline_s=JOIN_S,
        )
    return DistCommunicator(
        store,
        generation=generation,
        name=name,
        members=members,
        world_rank=rank,
        address=address,
        deadline_s=CALL_S,
        join_deadline_s=JOIN_S,
    )


def _latency_s(comm: Communicator, transport: str) -> float:
    return median(_calls(comm, transport, SMALL_BYTES, NUM_SMALL))


def _bytes_per_s(comm: Communicator, transport: str) -> float:
    return LARGE_BYTES / median(_calls(comm, transport, LARGE_BYTES // (comm.size - 1), NUM_LARGE))


def _calls(comm: Communicator, transport: str, num_bytes: int, count: int) -> list[float]:
    """Seconds of each of `count` all-to-alls with `num_bytes` to each other process, nothing to itself."""
    import torch

    device = "cuda" if transport == "nccl" else "cpu"
    rows = [0 if peer == comm.rank else 1 for peer in range(comm.size)]
    x_NB = torch.zeros(comm.size - 1, num_bytes, dtype=torch.uint8, device=device)
    took = []
    for _ in range(_WARM + count):
        began_s = time.perf_counter()
        comm.all_to_all_rows(x_NB, rows, rows)
        took.append(time.perf_counter() - began_s)
    return took[_WARM:]
