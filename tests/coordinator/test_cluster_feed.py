"""Changes of the cluster: each once, in order, and a clear word to who comes too late."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2dist.coordinator import ClusterFeed, Membership
from k2dist.coordinator.cluster_feed import CompactedError
from k2dist.ids import Generation, LaneId

ALL = Membership(lanes=(LaneId(0), LaneId(1)))
ONE = replace(ALL, lanes=(LaneId(1),))
DRAINING = replace(ONE, is_draining=True)


def test_each_change_has_the_next_revision() -> None:
    feed = ClusterFeed(ALL, first_revision=1000)
    assert not feed.note(ALL)
    assert feed.note(ONE)
    assert not feed.note(ONE)
    assert feed.note(DRAINING)
    feed.check()
    assert feed.since(0) == ((1002, DRAINING),)
    assert feed.since(1000) == ((1000, ALL), (1001, ONE), (1002, DRAINING))
    assert feed.since(1002) == ((1002, DRAINING),)
    assert feed.since(1003) == ()  # the next one, when it comes


def test_who_asks_for_what_is_gone_is_told_to_begin_anew() -> None:
    feed = ClusterFeed(ALL, first_revision=1, max_kept=4)
    for number in range(10):
        assert feed.note(replace(ALL, generation=Generation(number + 1)))
        feed.check()
    assert [revision for revision, _ in feed.since(8)] == [8, 9, 10, 11]
    for revision in (1, 7, 13):
        with pytest.raises(CompactedError, match=rf"start_revision: {revision}: kept are 8 to 11"):
            feed.since(revision)
