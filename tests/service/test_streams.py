"""What keeps gRPC streams alive and bounded: heartbeats, pings, sizes, counts; and tasks that really end."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from msgspec.structs import replace

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist._proto.v1 import inference_pb2_grpc
from k2dist.config.cluster import ClusterConfig, SchedulerConfig
from k2dist.service import beating
from k2dist.service.answer_events import Delta, Finished
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.coordinator import Coordinator, CoordinatorLimits
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane

FOREVER = PartialSampling(max_tokens=900, ignore_eos=True)


async def test_a_stream_is_never_silent(
    serve: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for a lane, and between tokens; and beats are not in the way of tokens."""
    monkeypatch.setattr(beating, "HEARTBEAT_S", 0.05)
    lane = FakeLane(tokenizer, step_s=0.12)
    lane.admit_gate.clear()
    async with serve(lane) as client, grpc.aio.insecure_channel(client.address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="v"))
        messages = aiter(call)
        kinds = [(await anext(messages)).WhichOneof("event") for _ in range(3)]
        assert kinds == ["heartbeat"] * 3
        lane.admit_gate.set()
        kinds = [message.WhichOneof("event") async for message in messages]
        without = [kind for kind in kinds if kind != "heartbeat"]
        assert without == ["accepted", *["delta"] * 5, "finished"]
        assert kinds.count("heartbeat") > 5
        events = [event async for event in client.generate(ClientRequest(prompt="x"))]
        assert [type(event) for event in events[1:]] == [Delta, Delta, Delta, Finished]  # it passes over them


async def test_pings_earn_no_goaway(serve: Serve, tokenizer: Tokenizer) -> None:
    """A client that pings ten times a second, more often than servers like, on a stream without tokens."""
    options = (
        ("grpc.keepalive_time_ms", 100),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_time_between_pings_ms", 100),
    )
    lane = FakeLane(tokenizer)
    lane.admit_gate.clear()
    async with (
        serve(lane) as client,
        grpc.aio.insecure_channel(client.address, options=options) as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="v"))
        await asyncio.sleep(1.5)
        lane.admit_gate.set()
        kinds = [message.WhichOneof("event") async for message in call]
        assert kinds[-1] == "finished"


async def test_a_message_too_large_is_refused_and_no_more(serve: Serve, tokenizer: Tokenizer) -> None:
    options = (("grpc.max_send_message_length", -1),)
    async with (
        serve(FakeLane(tokenizer)) as client,
        grpc.aio.insecure_channel(client.address, options=options) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(text="a" * (16 * 2**20 + 1)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=[("x-large", "a" * 100_000)])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len((await stub.Tokenize(pb.TokenizeRequest(text="ab"))).token_ids) == 2


async def test_a_grpc_reader_that_reads_nothing_stalls_nobody(serve: Serve, tokenizer: Tokenizer) -> None:
    """More than the transport buffers waits for it; the lane and others go on, and it loses nothing."""
    lane = FakeLane(tokenizer, script=lambda _: [97] * 1000)
    sampling = PartialSampling(max_tokens=900, ignore_eos=True, logprobs=20)
    async with serve(lane) as client, AsyncClient(client.address) as other:
        stub = inference_pb2_grpc.InferenceStub(other._channel)
        written = pb.Sampling(max_tokens=900, ignore_eos=True, logprobs=20)
        calls = [stub.Generate(pb.GenerateRequest(text="a", sampling=written)) for _ in range(3)]
        readers = [aiter(call) for call in calls]
        for reader in readers:
            await anext(reader)  # accepted, and then nothing more
        fast = [event async for event in client.generate(ClientRequest(prompt="b", sampling=sampling))]
        assert isinstance(fast[-1], Finished)
        while lane.num_pages_used:  # all have been generated, read or not
            await asyncio.sleep(0.005)
        for reader in readers:
            messages = [message async for message in reader]
            assert sum(len(message.delta.token_ids) for message in messages) == 900


async def test_more_streams_than_one_connection_may_have_wait(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2dist.service.coordinator_actor._MORE_STREAMS", 0)
    small = replace(
        config,
        scheduler=SchedulerConfig(max_running=1),
        service=replace(config.service, max_queued=2),
    )
    lane = FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.02)
    async with serve(lane, changed=small) as client:
        running = client.generate(ClientRequest(prompt="a", sampling=FOREVER))
        await anext(running)
        queued = [client.generate(ClientRequest(prompt="a", sampling=FOREVER)) for _ in range(2)]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in queued]
        await asyncio.sleep(0.1)  # until they are on their way
        fourth = asyncio.ensure_future(client.topology())  # one runs, two are queued: three streams
        await asyncio.sleep(0.2)
        assert not fourth.done()
        await running.aclose()
        assert (await fourth).live_outputs <= 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_dispatcher_that_is_told_to_end_ends(tokenizer: Tokenizer) -> None:
    """Cancelled in the very moment in which it is woken: asyncio.wait_for of Python 3.11 swallows that."""
    lane = FakeLane(tokenizer)
    limits = CoordinatorLimits(max_queued=1, queue_s=1.0, lane_outputs=1, log_bytes=2**20, retain_s=1.0)
    coordinator: Coordinator[None] = Coordinator([lane], limits)
    coordinator.start()
    await asyncio.sleep(0.01)
    coordinator._has_room.set()
    async with asyncio.timeout(1.0):
        await coordinator.stop()
    assert not coordinator._tasks
