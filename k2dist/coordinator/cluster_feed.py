"""How the cluster stands, and every change of it under a revision of its own: what `WatchCluster` reads.

    revision   41        42            43
    state      A   ──>   B   ──>   C (now)      kept: the last `max_kept`; older ones are compacted

Each entry is the whole state, so that a watcher can be late but never wrong. What moves with every step
(loads, queues) is not part of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from k2dist.errors import RequestError
from k2dist.ids import Generation, LaneId, WorldRank

_NONE = Generation(0)


class CompactedError(RequestError):
    """Changes from the revision asked for are no longer kept."""


@dataclass(frozen=True, slots=True)
class Member:
    """`state` in the supervision table's words; `node`: its address, empty before it has a process."""

    world_rank: WorldRank
    state: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class Membership:
    lanes: tuple[LaneId, ...]  # those that live
    is_draining: bool = False
    generation: Generation = _NONE
    ranks: tuple[Member, ...] = ()


class ClusterFeed:
    """`first_revision`: larger than any that an earlier feed of this cluster gave, so that its watchers are
    told to begin anew; milliseconds since 1970 are, as long as there are fewer than 1,000 changes a
    second."""

    def __init__(self, state: Membership, *, first_revision: int, max_kept: int = 256) -> None:
        self._kept: deque[tuple[int, Membership]] = deque([(first_revision, state)], maxlen=max_kept)

    @property
    def revision(self) -> int:
        return self._kept[-1][0]

    @property
    def state(self) -> Membership:
        return self._kept[-1][1]

    def note(self, state: Membership) -> bool:
        """True if that is another state than before: it has the next revision then."""
        if state == self.state:
            return False
        self._kept.append((self.revision + 1, state))
        return True

    def since(self, revision: int) -> tuple[tuple[int, Membership], ...]:
        """Every change from `revision` on, oldest first; 0: the present state alone.

        CompactedError: some are no longer kept, or the revision is one that never was.
        """
        if revision == 0:
            return (self._kept[-1],)
        oldest = self._kept[0][0]
        if not oldest <= revision <= self.revision + 1:
            raise CompactedError(
                "start_revision",
                f"{revision}: kept are {oldest} to {self.revision}; begin anew with 0, the state as it is",
            )
        return tuple(entry for entry in self._kept if entry[0] >= revision)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        revisions = [revision for revision, _ in self._kept]
        assert revisions == list(range(revisions[0], revisions[0] + len(revisions))), f"gaps: {revisions}"
        states = [state for _, state in self._kept]
        assert all(a != b for a, b in pairwise(states)), "a change that is none"
