"""Streams that are cut at the network's whim, and clients that do not notice."""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.errors import UnavailableError
from k2dist.service.answer_events import Accepted, AnswerEvent, Delta, Finished
from k2dist.service.client import AsyncClient, Client
from k2dist.service.client_request import ClientRequest
from k2dist.service.whole_answer import WholeAnswer
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane


class Line:
    """A relay to `address` whose connections can be cut, and which can be closed altogether."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self.is_open = True
        self.num_cuts = 0

    def cut(self) -> None:
        self.num_cuts += 1
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, there[1]}
        try:
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer), return_exceptions=True)
        finally:
            self._writers -= {writer, there[1]}
            for end in (writer, there[1]):
                end.transport.abort()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def line_to(address: str) -> AsyncIterator[tuple[Line, str]]:
    line = Line(address)
    server = await asyncio.start_server(line.relay, "127.0.0.1", 0)
    try:
        yield line, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        line.is_open = False
        line.cut()
        server.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_a_stream_that_is_cut_again_and_again_is_whole(serve: Serve, tokenizer: Tokenizer) -> None:
    text = string.ascii_lowercase * 12
    lane = FakeLane(tokenizer, script=lambda _: [*text.encode(), 258], step_s=0.01)
    async with serve(lane) as client, line_to(client.address) as (line, address):
        first_lost, token_ids, shown = [1, 10, 11, 30], list[int](), ""
        events: list[AnswerEvent] = []
        async with AsyncClient(address) as cut:
            async for event in cut.generate_lasting(ClientRequest(prompt="a")):
                events.append(event)
                if isinstance(event, Delta):
                    assert not event.token_ids or event.first_index == len(token_ids), "gapless"
                    token_ids += event.token_ids
                    shown += event.text
                if first_lost and len(events) >= first_lost[0]:
                    line.cut()
                    first_lost.pop(0)
        assert line.num_cuts == 4
        assert (shown, token_ids) == (text, [*text.encode(), 258])
        assert [type(event) for event in (events[0], events[-1])] == [Accepted, Finished]
        assert not lane.cancelled


async def test_who_leaves_ends_the_request_all_the_same(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.005)
    async with serve(lane) as client:
        events = client.generate_lasting(ClientRequest(prompt="a", request_id="r"))
        await anext(events)
        await events.aclose()
        await until(lambda: lane.cancelled == ["r"] and lane.num_pages_used == 0)
        assert (await client.abort("r")).result == pb.AbortResponse.RESULT_ALREADY_FINISHED


async def test_nobody_is_waited_for_without_end(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, step_s=0.05)
    async with serve(lane) as client, line_to(client.address) as (line, address), AsyncClient(address) as cut:
        events = cut.generate_lasting(ClientRequest(prompt="a"), reconnect_s=0.3)
        await anext(events)
        line.is_open = False
        line.cut()
        with pytest.raises(UnavailableError):
            _ = [event async for event in events]


async def test_before_it_is_accepted_it_is_sent_again_and_is_one(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer)
    lane.admit_gate.clear()
    async with serve(lane) as client, line_to(client.address) as (line, address), AsyncClient(address) as cut:
        events = cut.generate_lasting(ClientRequest(prompt="a"))
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.2)
        line.cut()
        await asyncio.sleep(0.5)
        lane.admit_gate.set()
        assert isinstance(await first, Accepted)
        rest = [event async for event in events]
        assert isinstance(rest[-1], Finished)
        assert (await client.topology()).live_outputs == 0


async def test_the_synchronous_client_does_the_same(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer, step_s=0.02)) as client, line_to(client.address) as (line, address):
        loop = asyncio.get_running_loop()

        def use() -> WholeAnswer:
            answer = WholeAnswer()
            with Client(address) as cut:
                for number, event in enumerate(cut.generate_lasting(ClientRequest(prompt="a"))):
                    answer.add(event)
                    if number == 5:
                        loop.call_soon_threadsafe(line.cut)
            return answer

        answer = await asyncio.to_thread(use)
        assert line.num_cuts == 1
        assert answer.text == string.ascii_lowercase[1:]
