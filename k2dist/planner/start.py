"""How long it takes from the command to the first request, and from one generation to the next."""

from __future__ import annotations

from collections.abc import Sequence

from k2dist.messages import Message
from k2dist.planner.rank_memory import RankMemory
from k2dist.planner.site import Site

RATES = (0.5e9, 1e9, 2e9, 5e9, 10e9, 25e9)  # bytes a second that a node reads: from a slow NFS to four NVMe


class AtRate(Message, frozen=True, kw_only=True):
    disk_rate: float  # bytes a second that one node reads
    load_s: float
    ready_s: float


class StartEstimate(Message, frozen=True, kw_only=True):
    """All ranks of a node read side by side over one disk or mount, then lay out and test each for itself.

    `load_s`: reading and laying out. `warm_s`: a step of every size, for which kernels are compiled; 0 on a
    CPU. `recapture_s`: of all graphs together, before the first request and again in each
    generation. `ready_s`: from the command to the first request.
    """

    rank_bytes: int  # of the checkpoint, read by the rank that reads most
    node_bytes: int  # likewise, by all ranks of a node
    total_bytes: int  # by all nodes, from a storage that they share
    disk_rate: float
    start_s: float
    read_s: float
    load_s: float
    test_s: float
    warm_s: float
    join_s: float
    num_graphs: int
    recapture_s: float
    ready_s: float
    by_rate: tuple[AtRate, ...]


def estimate_start(ranks: Sequence[RankMemory], site: Site, num_graphs: int) -> StartEstimate:
    """`ranks` in rank order."""
    assumed, size = site.assumed, site.ranks_per_node
    nodes = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    node_bytes = max(sum(rank.read_bytes for rank in node) for node in nodes)
    rank_bytes = max(rank.read_bytes for rank in ranks)
    start_s = assumed.start_s
    test_s = rank_bytes / assumed.test_rate
    recapture_s = num_graphs * assumed.capture_s
    warm_s = 0.0 if site.is_cpu else assumed.compile_s
    after_s = test_s + warm_s + assumed.join_s + recapture_s

    def at(disk_rate: float) -> AtRate:
        load_s = node_bytes / disk_rate + rank_bytes / assumed.layout_rate
        return AtRate(disk_rate=disk_rate, load_s=load_s, ready_s=start_s + load_s + after_s)

    here = at(assumed.disk_rate)
    return StartEstimate(
        rank_bytes=rank_bytes,
        node_bytes=node_bytes,
        total_bytes=sum(rank.read_bytes for rank in ranks),
        disk_rate=assumed.disk_rate,
        start_s=start_s,
        read_s=node_bytes / assumed.disk_rate,
        load_s=here.load_s,
        test_s=test_s,
        warm_s=warm_s,
        join_s=assumed.join_s,
        num_graphs=num_graphs,
        recapture_s=recapture_s,
        ready_s=here.ready_s,
        by_rate=tuple(at(rate) for rate in RATES),
    )
