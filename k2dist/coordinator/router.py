"""Which lane takes a request."""

from __future__ import annotations

from collections.abc import Sequence

from k2dist.errors import UnavailableError
from k2dist.ids import LaneId
from k2dist.messages import LaneLoad


def choose(loads: Sequence[LaneLoad]) -> LaneId:
    """The lane with the fewest sequences; of those, the one with most free pages; of those, the lowest.

    Which lane holds a prefix of the prompt does not count: lanes do not tell what their pages hold.
    `loads` must count what was sent to a lane since it last reported, or a burst all goes to one lane.
    """
    if not loads:
        raise UnavailableError("no lane is serving; try again once the cluster is up")
    return min(loads, key=_load).lane


def _load(load: LaneLoad) -> tuple[int, int, int]:
    return (load.num_running + load.num_waiting, -load.num_pages_free, load.lane)
