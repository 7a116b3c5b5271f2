"""All ranks record the same sizes, largest first, until the first of them has to stop."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from k2dist.comm import thread_world
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.form import Form, FormRule
from k2dist.engine.graphs import Recorder, TwinRecorder
from k2dist.engine.recording import record_sizes
from k2dist.parallel.buckets import Bucket

RULE = FormRule.of(tp=1, world_size=1, padding=None, most_rows=4, most_pages=16, split_tokens=None)
SIZES = [Bucket(4, 16), Bucket(2, 16), Bucket(1, 16)]


class Passes:
    """Notes what it is to record, and takes a second for it by its own clock."""

    def __init__(self) -> None:
        self.forms: list[Form] = []
        self.now_s = 0.0

    def record(self, form: Form, recorder: Recorder) -> None:
        self.forms.append(form)
        self.now_s += 1.0

    def clock(self) -> float:
        return self.now_s


def record(limits_s: Sequence[float], recorders: Sequence[Recorder | None]) -> list[tuple[Bucket, ...]]:
    """What each rank has recorded; its rule says the same."""
    ranks = [Passes() for _ in limits_s]

    def one(rank: int, comm: object) -> tuple[Bucket, ...]:
        passes = ranks[rank]
        with DeviceThread(f"rank-{rank}") as thread:
            rule = record_sizes(
                RULE,
                passes,  # type: ignore[arg-type]
                recorders[rank],
                comm,  # type: ignore[arg-type]
                thread,
                limit_s=limits_s[rank],
                clock=passes.clock,
            )
        assert rule.buckets == tuple(form.bucket for form in passes.forms)
        return rule.buckets

    with ThreadPoolExecutor(len(limits_s)) as pool:
        return list(pool.map(one, range(len(limits_s)), thread_world(len(limits_s), 10.0)))


RECORDER = TwinRecorder(lambda: None)


@pytest.mark.parametrize(
    ("limits_s", "num_recorded"), [((9, 9, 9), 3), ((9, 1.5, 9), 2), ((0, 9, 9), 0)], ids=str
)
def test_the_first_whose_time_is_over_stops_all(limits_s: Sequence[float], num_recorded: int) -> None:
    assert record(limits_s, [RECORDER] * 3) == [tuple(SIZES[:num_recorded])] * 3


def test_one_that_cannot_record_keeps_all_from_it() -> None:
    assert record((9, 9), [RECORDER, None]) == [(), ()]


def test_what_a_rank_raises_is_raised() -> None:
    class Broken(Passes):
        def record(self, form: Form, recorder: Recorder) -> None:
            raise MemoryError("no room for a graph")

    (comm,) = thread_world(1, 1.0)
    with DeviceThread("rank-0") as thread, pytest.raises(MemoryError, match="no room"):
        record_sizes(RULE, Broken(), RECORDER, comm, thread, limit_s=9.0)  # type: ignore[arg-type]
