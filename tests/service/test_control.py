"""The cluster's changes as they are watched, and draining."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from k2dist._proto.v1 import control_pb2 as pb
from k2dist.cluster.status import ClusterStatus, RankStatus
from k2dist.config.cluster import ClusterConfig
from k2dist.coordinator.cluster_feed import CompactedError
from k2dist.errors import PeerError, RequestError
from k2dist.ids import Generation, WorldRank
from k2dist.observe import WorldState
from k2dist.service import control_servicer
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.supervision.table import RankState
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane


class FakeSupervisor:
    """Says what it is told to; `ranks` are states by rank."""

    def __init__(self) -> None:
        self._status = ClusterStatus(revision=0, phase="running", generation=Generation(0), ranks=())
        self._changed = asyncio.Condition()
        self.num_calls = 0

    async def say(self, generation: int, *states: str) -> None:
        ranks = tuple(
            RankStatus(world_rank=WorldRank(rank), state=state, node="10.0.0.1")
            for rank, state in enumerate(states)
        )
        async with self._changed:
            self._status = ClusterStatus(
                revision=self._status.revision + 1,
                phase="running",
                generation=Generation(generation),
                ranks=ranks,
            )
            self._changed.notify_all()

    async def wait(self, revision: int) -> ClusterStatus:
        self.num_calls += 1
        if self.num_calls == 1:
            raise PeerError("the supervisor did not answer")
        async with self._changed:
            await self._changed.wait_for(lambda: self._status.revision > revision)
        return self._status

    async def look(self, timeout_s: float) -> WorldState:
        raise PeerError("it is only watched here")


async def test_every_change_is_told_once_and_in_order(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2dist.service.cluster_watch._AGAIN_S", 0.01)
    supervisor = FakeSupervisor()
    lanes = FakeLane(tokenizer, lane=0), FakeLane(tokenizer, lane=1)
    actor = CoordinatorActor(config, model_dir, lanes, supervision=supervisor)
    async with AsyncClient(await actor.start()) as client:
        watched = client.watch()
        first = await anext(watched)
        assert first.header.cluster == "test"
        assert list(first.change.lanes) == [0, 1]
        await supervisor.say(1, "joined", "loading")  # after a call that failed
        second = await anext(watched)
        assert second.header.revision == first.header.revision + 1
        assert second.header.generation == 1
        assert [rank.state for rank in second.change.ranks] == [
            pb.RANK_STATE_JOINED,
            pb.RANK_STATE_LOADING,
        ]
        lanes[0].die("it died")
        third = await anext(watched)
        assert list(third.change.lanes) == [1]
        topology = await client.topology()
        assert topology.header == third.header
        assert topology.ranks == third.change.ranks
        draining = asyncio.ensure_future(client.drain())
        fourth = await anext(watched)
        assert fourth.change.state == pb.SERVICE_STATE_DRAINING
        assert (await draining).is_drained
        again = client.watch(first.header.revision)  # a watcher whose stream broke
        assert [await anext(again) for _ in range(4)] == [first, second, third, fourth]
        late = client.watch(fourth.header.revision)
        assert await anext(late) == fourth
    await actor.stop()


async def test_a_watcher_that_comes_too_late_begins_anew(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        now = (await anext(client.watch())).header.revision
        for revision in (1, now + 2):
            with pytest.raises(CompactedError, match="begin anew with 0"):
                await anext(client.watch(revision))


async def test_where_nothing_changes_it_is_said(
    serve: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_servicer, "HEARTBEAT_S", 0.05)
    async with serve(FakeLane(tokenizer)) as client:
        watched = client.watch()
        first = await anext(watched)
        for _ in range(2):
            silent = await anext(watched)
            assert not silent.HasField("change")
            assert silent.header.revision == first.header.revision


async def test_a_draining_without_a_limit_is_refused(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        for timeout_s in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(RequestError, match="timeout_s"):
                await client.drain(timeout_s)
        assert (await client.topology()).state == pb.SERVICE_STATE_SERVING


def test_every_state_of_a_rank_has_a_name_on_the_wire() -> None:
    assert set(control_servicer._RANK_STATES) == {state.value for state in RankState} | {"unspecified"}


async def test_a_draining_that_is_given_up_says_what_goes_on(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, step_s=0.01)
    endless = PartialSampling(max_tokens=900, ignore_eos=True)
    async with serve(lane) as client:
        events = client.generate(ClientRequest(prompt="a", sampling=endless, num_outputs=2))
        await anext(events)
        answer = await client.drain(0.05)
        assert (answer.is_drained, answer.live_outputs) == (False, 2)
        await events.aclose()
        answer = await client.drain(10)
        assert (answer.is_drained, answer.live_outputs) == (True, 0)
