"""Two coordinators, each with lanes of its own: a request is found from either."""

from __future__ import annotations

import asyncio
import string
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from msgspec.structs import replace

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.config.cluster import ClusterConfig
from k2dist.coordinator import home_of
from k2dist.errors import RequestError, UnavailableError
from k2dist.service.answer_events import Accepted, AnswerEvent, Delta
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling, Position
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.error_codes import RequestIdInUseError, UnknownRequestError
from k2dist.service.new_key import add_key
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane


def id_at(home: int) -> str:
    return next(name for name in map(str, range(100)) if home_of(name, 2) == home)


def text_of(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def read(events: AsyncIterator[AnswerEvent]) -> list[AnswerEvent]:
    return [event async for event in events]


@asynccontextmanager
async def pair(
    config: ClusterConfig, model_dir: Path, lanes: tuple[FakeLane, FakeLane]
) -> AsyncIterator[tuple[CoordinatorActor, CoordinatorActor]]:
    actors = tuple(CoordinatorActor(config, model_dir, [lane]) for lane in lanes)
    addresses = [await actor.start() for actor in actors]
    for home, (actor, lane) in enumerate(zip(actors, lanes, strict=True)):
        await actor.join(home, addresses)
        lane.start()
    try:
        yield actors[0], actors[1]
    finally:
        for actor, lane in zip(actors, lanes, strict=True):
            await actor.stop()
            await lane.stop()


async def test_each_is_asked_for_what_the_other_has(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    mine, theirs = add_key(keys, tenant="a"), add_key(keys, tenant="b")
    config = replace(config, service=replace(config.service, api_keys=str(keys)))
    lanes = FakeLane(tokenizer, step_s=0.002), FakeLane(tokenizer, step_s=0.002)
    async with (
        pair(config, model_dir, lanes) as actors,
        AsyncClient(await actors[0].address(), api_key=mine) as zero,
        AsyncClient(await actors[1].address(), api_key=mine) as one,
        AsyncClient(await actors[0].address(), api_key=theirs) as stranger,
    ):
        name, new_id = id_at(1), "c1-new"
        request = ClientRequest(prompt="a", request_id=name)
        whole = await read(zero.generate(request))  # asked at 0, answered by 1
        assert (lanes[0].num_pages_used, text_of(whole)) == (0, string.ascii_lowercase[1:])
        assert (await actors[1].stats()).num_outputs == 0
        assert await read(one.generate(request))  # its twin, attached
        for client in (zero, one):
            position = Position(output_index=0, token_index=10)
            assert text_of(await read(client.resume(name, [position]))) == string.ascii_lowercase[11:]
            assert (await client.abort(name)).result == pb.AbortResponse.RESULT_ALREADY_FINISHED
            with pytest.raises(RequestIdInUseError):
                await read(client.generate(ClientRequest(prompt="b", request_id=name)))
            bad = ClientRequest(prompt="b", request_id=new_id, sampling=PartialSampling(top_p=2.0))
            with pytest.raises(RequestError, match=r"sampling\.top_p") as caught:
                await read(client.generate(bad))
            assert caught.value.field == "sampling.top_p"
        with pytest.raises(UnknownRequestError, match=f"'{name}' is not known"):
            await read(stranger.resume(name))


async def test_an_id_that_is_drawn_names_who_drew_it(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer
) -> None:
    lanes = FakeLane(tokenizer), FakeLane(tokenizer)
    async with pair(config, model_dir, lanes) as actors:
        for home, actor in enumerate(actors):
            async with AsyncClient(await actor.address()) as client:
                accepted = (await read(client.generate(ClientRequest(prompt="z"))))[0]
                assert isinstance(accepted, Accepted)
                drawn, _, rest = accepted.request_id.partition("-")
                assert (drawn, str(uuid.UUID(rest))) == (f"c{home}", rest)
            async with AsyncClient(await actors[1 - home].address()) as other:
                assert (await read(other.resume(accepted.request_id)))[0] == accepted


async def test_leaving_a_forwarded_stream_ends_its_request(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer
) -> None:
    lanes = FakeLane(tokenizer), FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.005)
    async with pair(config, model_dir, lanes) as actors, AsyncClient(await actors[0].address()) as zero:
        events = zero.generate(ClientRequest(prompt="a", request_id=id_at(1)))
        await anext(events)
        await events.aclose()
        while not lanes[1].cancelled or lanes[1].num_pages_used:
            await asyncio.sleep(0.005)


async def test_one_that_is_gone_is_named_and_a_second_hop_is_none(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer
) -> None:
    lanes = FakeLane(tokenizer), FakeLane(tokenizer)
    async with pair(config, model_dir, lanes) as actors, AsyncClient(await actors[0].address()) as zero:
        gone = await actors[1].address()
        await actors[1].join(0, [gone, await actors[0].address()])  # it takes itself for number 0
        with pytest.raises(UnavailableError, match="coordinators disagree"):
            await read(zero.generate(ClientRequest(prompt="a", request_id=id_at(1))))
        await actors[1].stop()
        with pytest.raises(UnavailableError, match=f"the coordinator at {gone}"):
            await read(zero.generate(ClientRequest(prompt="a", request_id=id_at(1))))
        assert len(await read(zero.generate(ClientRequest(prompt="y", request_id=id_at(0))))) > 2


async def test_a_deadline_is_passed_on(config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer) -> None:
    lanes = FakeLane(tokenizer), FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.01)
    async with (
        pair(config, model_dir, lanes) as actors,
        grpc.aio.insecure_channel(await actors[0].address()) as channel,
    ):
        call = channel.unary_stream(
            "/k2dist.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateEvent.FromString,
        )(pb.GenerateRequest(text="a", request_id=id_at(1)), timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [message async for message in call]
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while not lanes[1].cancelled:
            await asyncio.sleep(0.005)
