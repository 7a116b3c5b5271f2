"""The lane with the least to do, and always the same one of equals."""

import pytest

from k2dist.coordinator import choose
from k2dist.errors import UnavailableError
from k2dist.messages import LaneLoad


def load(lane: int, running: int, waiting: int, free: int = 8) -> LaneLoad:
    return LaneLoad(lane=lane, num_running=running, num_waiting=waiting, num_pages=8, num_pages_free=free)


@pytest.mark.parametrize(
    ("loads", "lane"),
    [
        ([load(0, 2, 0), load(1, 1, 0)], 1),
        ([load(0, 1, 2), load(1, 2, 0)], 1),  # who waits counts as well
        ([load(0, 1, 1, free=3), load(1, 2, 0, free=5)], 1),
        ([load(3, 1, 0), load(2, 1, 0)], 2),
    ],
)
def test_the_least_loaded_lane_is_chosen(loads: list[LaneLoad], lane: int) -> None:
    assert choose(loads) == lane
    assert choose(loads[::-1]) == lane


def test_without_lanes_there_is_nothing_to_choose() -> None:
    with pytest.raises(UnavailableError, match="no lane is serving"):
        choose([])
