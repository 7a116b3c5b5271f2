"""A lane across a process border: values pass through, failures are PeerErrors that name the rank."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from k2dist.cluster import lane_handle
from k2dist.cluster.lane_handle import LaneHandle
from k2dist.errors import PeerError, UnavailableError
from k2dist.ids import LaneId, RequestId, WorldRank
from k2dist.messages import EventBatch, LaneLoad

LOAD = LaneLoad(lane=LaneId(1), num_running=2, num_waiting=3, num_pages=4, num_pages_free=5)


class FakeActor:
    """`actor.<method>.remote(...)` gives what `answer` returns; `asked` keeps the calls."""

    def __init__(self, answer: Callable[[], Awaitable[Any]]) -> None:
        self._answer = answer
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        actor = self

        class Call:
            def remote(self, *args: Any) -> Awaitable[Any]:
                actor.asked.append((method, *args))
                return actor._answer()

        return Call()


def handle(answer: Callable[[], Awaitable[Any]]) -> tuple[LaneHandle, FakeActor]:
    actor = FakeActor(answer)
    return LaneHandle(LaneId(1), WorldRank(2), actor, call_s=0.05), actor


async def giving(value: Any) -> Any:
    return value


async def raising(error: BaseException) -> Any:
    raise error


async def hanging() -> None:
    await asyncio.sleep(60)


def test_calls_and_answers_pass_through() -> None:
    lane, actor = handle(lambda: giving(LOAD))
    assert asyncio.run(lane.load()) == LOAD
    asyncio.run(lane.cancel((RequestId("a"),)))
    asyncio.run(lane.drain())
    assert actor.asked == [("lane_load",), ("cancel", ("a",)), ("drain",)]


def test_events_wait_at_the_lane_and_a_little_longer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_handle, "POLL_S", 0.2)
    batch = EventBatch(next=7, events=())

    async def late() -> EventBatch:
        await asyncio.sleep(0.15)  # longer than call_s, as a long poll is
        return batch

    lane, actor = handle(late)
    assert asyncio.run(lane.events(7)) == batch
    assert actor.asked == [("events", 7, 0.2)]


def test_a_lane_that_hangs_is_named_after_the_deadline() -> None:
    lane, _ = handle(hanging)
    with pytest.raises(
        PeerError, match=r"lane 1 \(world rank 2\) did not answer load within .*call_s=0.05"
    ) as e:
        asyncio.run(lane.load())
    assert e.value.ranks == (2,)


def test_a_lane_that_died_is_named() -> None:
    lane, _ = handle(lambda: raising(ActorDiedError()))
    with pytest.raises(PeerError, match=r"lane 1 \(world rank 2\) died") as caught:
        asyncio.run(lane.live())
    assert caught.value.ranks == (2,)


def test_an_error_of_ours_arrives_as_itself() -> None:
    error = RayTaskError("admit", "traceback", UnavailableError("draining"))
    lane, _ = handle(lambda: raising(error))
    with pytest.raises(UnavailableError, match=r"^draining$"):
        asyncio.run(lane.admit(()))


def test_a_bug_in_the_rank_stays_a_bug() -> None:
    lane, _ = handle(lambda: raising(RayTaskError("admit", "traceback", ZeroDivisionError())))
    with pytest.raises(RayTaskError):
        asyncio.run(lane.admit(()))
