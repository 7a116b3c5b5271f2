"""A process on one node that answers questions about it: the class of a Ray actor."""

from __future__ import annotations

import time
from typing import Any

from k2dist.doctor.facts import Link, NodeFacts
from k2dist.errors import PeerError
from k2dist.probe.links import JOIN_S, LinkRate, measure_here, measure_link
from k2dist.probe.machine import Wanted, node_facts


class Prober:
    """On `node`, which is also where it listens. One question at a time."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._store: Any = None  # torch's TCPStore; it serves while it is held

    def facts(self, wanted: Wanted) -> NodeFacts:
        return node_facts(self._node, wanted)

    def now_s(self) -> float:
        return time.time()

    def host_store(self) -> int:
        """Where others meet for one measurement; its port. CapacityError if it cannot listen here."""
        from k2dist.comm import host_store  # torch takes seconds to import, and facts need none of it

        self._store = host_store(self._node)
        return int(self._store.port)

    def link(self, host: str, port: int, *, name: str, rank: int, size: int, transport: str) -> LinkRate:
        """This node's part of one measurement."""
        from k2dist.comm import join_store

        try:
            store = join_store(host, port, JOIN_S)
        except PeerError as error:
            return LinkRate(reason=str(error))
        return measure_link(store, name=name, rank=rank, size=size, address=self._node, transport=transport)

    def link_here(self) -> Link:
        """Between two threads of this process, where there is no other node."""
        return measure_here(self._node)
