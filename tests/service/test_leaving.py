"""Clients that go away, deadlines, Abort, Resume, lanes that die, draining."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.config.cluster import ClusterConfig, ServiceConfig
from k2dist.errors import K2Error, PeerError, RequestError, UnavailableError
from k2dist.messages import EventBatch
from k2dist.service.answer_events import Accepted, AnswerEnd, AnswerEvent, Delta, Failed, Finished
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling, Position
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.error_codes import UnknownRequestError
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane

FOREVER = PartialSampling(max_tokens=900, ignore_eos=True)


def counting(prompt: tuple[int, ...]) -> list[int]:
    """An answer without end: a, b, ... z, a, b, ..."""
    return [ord(string.ascii_lowercase[i % 26]) for i in range(1000)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def read_some(client: AsyncClient, request: ClientRequest, num_events: int) -> list[AnswerEvent]:
    """Some events of an answer, and then leave."""
    events = client.generate(request)
    try:
        return [await anext(events) for _ in range(num_events)]
    finally:
        await events.aclose()


async def test_a_client_that_leaves_frees_its_pages_within_a_step(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=counting, step_s=0.01)
    async with serve(lane) as client:
        await read_some(client, ClientRequest(prompt="a", request_id="gone", sampling=FOREVER), 3)
        await until(lambda: bool(lane.cancelled))
        at = lane.num_steps
        await until(lambda: lane.num_pages_used == 0)
        assert lane.num_steps <= at + 1
        assert lane.cancelled == ["gone"]
        assert (await client.topology()).live_outputs == 0


async def test_a_connection_that_breaks_ends_its_requests(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=counting, step_s=0.01)
    async with serve(lane) as client:
        other = AsyncClient(client.address)
        events = other.generate(ClientRequest(prompt="a", sampling=FOREVER))
        await anext(events)
        await other.close()
        await until(lambda: len(lane.cancelled) == 1 and lane.num_pages_used == 0)
        with pytest.raises((K2Error, asyncio.CancelledError)):
            _ = [event async for event in events]


async def test_who_leaves_the_queue_never_reaches_a_lane(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=counting, step_s=0.01)
    lane.admit_gate.clear()
    async with serve(lane) as client:
        waiting = asyncio.ensure_future(read_some(client, ClientRequest(prompt="a", request_id="b"), 1))
        await asyncio.sleep(0.1)
        assert not waiting.done()  # the lane has not replied: nothing was accepted
        waiting.cancel()
        await asyncio.sleep(0.05)
        lane.admit_gate.set()
        await until(lambda: lane.cancelled == ["b"])  # it was on its way, and is called back
        await until(lambda: lane.num_pages_used == 0)


async def test_a_deadline_ends_the_request(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=counting, step_s=0.01)
    async with serve(lane) as client:
        request = ClientRequest(prompt="a", sampling=FOREVER)
        with pytest.raises(PeerError, match="no answer within the deadline"):
            _ = [event async for event in client.generate(request, timeout_s=0.2)]
        await until(lambda: len(lane.cancelled) == 1 and lane.num_pages_used == 0)


async def test_abort_says_what_it_found(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=counting, step_s=0.005)
    async with serve(lane) as client:
        events = client.generate(ClientRequest(prompt="a", request_id="r", sampling=FOREVER))
        seen = [await anext(events) for _ in range(4)]
        response = await client.abort("r")
        assert response.result == pb.AbortResponse.RESULT_ABORTED
        assert response.completion_tokens >= 2
        seen += [event async for event in events]
        assert isinstance(seen[-1], Finished)
        assert seen[-1].reason is AnswerEnd.ABORTED
        assert (await client.abort("r")).result == pb.AbortResponse.RESULT_ALREADY_FINISHED
        assert (await client.abort("s")).result == pb.AbortResponse.RESULT_NOT_FOUND
        assert lane.num_pages_used == 0


async def test_resume_reads_on_where_it_is_told(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, step_s=0.005)
    async with serve(lane) as client:
        request = ClientRequest(prompt="a", request_id="r", detached=True)
        head = await read_some(client, request, 6)
        first = sum(len(event.token_ids) for event in head if isinstance(event, Delta))
        position = Position(output_index=0, token_index=first)
        rest = [event async for event in client.resume("r", [position])]
        assert not lane.cancelled  # it was detached
        assert isinstance(rest[0], Accepted)
        assert rest[0] == head[0]
        assert isinstance(rest[1], Delta)
        assert rest[1].first_index == first
        texts = [event.text for event in (*head, *rest) if isinstance(event, Delta)]
        assert "".join(texts) == string.ascii_lowercase[1:]
        whole = [event async for event in client.resume("r")]
        assert (
            "".join(event.text for event in whole if isinstance(event, Delta)) == string.ascii_lowercase[1:]
        )
        with pytest.raises(RequestError, match="from_index: 99"):
            _ = [event async for event in client.resume("r", [Position(output_index=0, token_index=99)])]
        with pytest.raises(RequestError, match=r"from\[0\]\.output_index"):
            _ = [event async for event in client.resume("r", [Position(output_index=1, token_index=0)])]


async def test_resume_in_the_middle_of_a_character(serve: Serve, tokenizer: Tokenizer) -> None:
    answer = [*"a😀b".encode(), 258]
    async with serve(FakeLane(tokenizer, script=lambda _: answer)) as client:
        _ = [event async for event in client.generate(ClientRequest(prompt="x", request_id="r"))]
        for start in range(len(answer)):
            position = Position(output_index=0, token_index=start)
            rest = [event async for event in client.resume("r", [position])]
            text = "".join(event.text for event in rest if isinstance(event, Delta))
            assert text == ("a😀b" if start == 0 else "😀b" if start < 5 else "b" if start < 6 else "")


async def test_a_second_reader_keeps_the_request(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, step_s=0.005)
    async with serve(lane) as client:
        first = client.generate(ClientRequest(prompt="a", request_id="r"))
        await anext(first)
        second = client.resume("r")
        await anext(second)
        await first.aclose()
        events = [event async for event in second]
        assert isinstance(events[-1], Finished)
        assert events[-1].reason is AnswerEnd.STOP
        assert not lane.cancelled


async def test_a_slow_reader_delays_nobody(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=counting)
    async with serve(lane) as client:
        slow = client.generate(ClientRequest(prompt="a", sampling=FOREVER))
        await anext(slow)
        fast = [event async for event in client.generate(ClientRequest(prompt="b", sampling=FOREVER))]
        assert isinstance(fast[-1], Finished)
        events = [event async for event in slow]
        assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 900


async def test_a_lane_that_dies_fails_its_requests_and_no_others(serve: Serve, tokenizer: Tokenizer) -> None:
    lanes = (FakeLane(tokenizer, lane=0, step_s=0.01), FakeLane(tokenizer, lane=1, step_s=0.01))
    async with serve(*lanes) as client:
        streams = [client.generate(ClientRequest(prompt="a")) for _ in range(2)]
        accepted = [await anext(stream) for stream in streams]
        lanes[0].die("rank 3 did not arrive within deadlines.step_s=60")
        for first, stream in zip(accepted, streams, strict=True):
            assert isinstance(first, Accepted)
            last = [event async for event in stream][-1]
            if first.lane == 1:
                assert isinstance(last, Finished)
            else:
                assert isinstance(last, Failed)
                assert last.message == "rank 3 did not arrive within deadlines.step_s=60"
                assert last.retryable
        (after, *_) = await read_some(client, ClientRequest(prompt="y"), 1)
        assert isinstance(after, Accepted)
        assert after.lane == 1


async def test_with_no_lane_left_nothing_is_taken(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer)
    async with serve(lane) as client:
        lane.die("node lost")
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError, match="no lane is left"):
            await read_some(client, ClientRequest(prompt="a"), 1)


async def test_draining_finishes_what_was_accepted(
    tokenizer: Tokenizer, config: ClusterConfig, model_dir: Path
) -> None:
    lane = FakeLane(tokenizer, step_s=0.005)
    actor = CoordinatorActor(config, model_dir, [lane])
    async with AsyncClient(await actor.start()) as client:
        lane.start()
        stream = client.generate(ClientRequest(prompt="a"))
        await anext(stream)
        draining = asyncio.ensure_future(actor.drain(timeout_s=10))
        await until(lambda: bool(actor._parts and actor._parts.coordinator.is_draining))
        with pytest.raises(UnavailableError, match="draining"):
            await read_some(client, ClientRequest(prompt="b"), 1)
        last = [event async for event in stream][-1]
        assert isinstance(last, Finished)
        assert await draining
        assert (await actor.stats()).is_draining
    await actor.stop()
    await lane.stop()


async def test_draining_gives_up_at_its_deadline(
    tokenizer: Tokenizer, config: ClusterConfig, model_dir: Path
) -> None:
    lane = FakeLane(tokenizer, script=counting, step_s=0.01)
    actor = CoordinatorActor(config, model_dir, [lane])
    async with AsyncClient(await actor.start()) as client:
        lane.start()
        stream = client.generate(ClientRequest(prompt="a", sampling=FOREVER))
        await anext(stream)
        assert not await actor.drain(timeout_s=0.1)
        await actor.stop()
        with pytest.raises((K2Error, asyncio.CancelledError)):
            _ = [event async for event in stream]
    await lane.stop()


async def test_an_ended_request_is_forgotten_after_its_time(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig
) -> None:
    short = msgspec.structs.replace(config, service=ServiceConfig(grpc="127.0.0.1:0", retain_s=0.2))
    async with serve(FakeLane(tokenizer), changed=short) as client:
        _ = [event async for event in client.generate(ClientRequest(prompt="y", request_id="r"))]
        assert len([event async for event in client.resume("r")]) > 1
        await asyncio.sleep(0.3)
        with pytest.raises(UnknownRequestError, match="'r' is not known"):
            _ = [event async for event in client.resume("r")]
        again = [event async for event in client.generate(ClientRequest(prompt="x", request_id="r"))]
        assert isinstance(again[-1], Finished)  # and its id is free


class BrokenLane(FakeLane):
    """Answers `events` with an error that nobody expects."""

    async def events(self, after: int) -> EventBatch:
        if after > 2:
            raise ValueError("broken")
        return await super().events(after)


async def test_a_bug_in_a_lane_fails_its_requests_too(
    serve: Serve, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(BrokenLane(tokenizer, step_s=0.002)) as client:
        events = [event async for event in client.generate(ClientRequest(prompt="a"))]
    assert isinstance(events[-1], Failed)
    assert "ValueError: broken" in events[-1].message
    assert "service.task_failed" in caplog.text
