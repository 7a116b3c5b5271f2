"""Connections that ask nothing, take nothing, or are too many: bounded, and the others are answered."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from k2dist.config.cluster import TlsConfig
from k2dist.service import http_connections
from k2dist.service.http_server import HttpServer
from k2dist.service.tls import server_context
from tests.service.certificates import Authority

GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
HOLD = b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\n"
BULK = b"GET /bulk HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n"
OK, END = b"HTTP/1.1 200", b"ok\r\n0\r\n\r\n"
BULK_BYTES = 32 * 2**20  # more than sockets hold
PIECE_BYTES = 2**18
SHORT_S = 0.2

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[..., Awaitable[Stream]]


class App:
    """/hold is answered once `go` is set, /bulk with more than sockets hold, all else at once."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.was_left = asyncio.Event()  # by the client of /bulk

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/bulk":
            for _ in range(BULK_BYTES // PIECE_BYTES):
                await send({"type": "http.response.body", "body": bytes(PIECE_BYTES), "more_body": True})
            if (await receive())["type"] == "http.disconnect":
                self.was_left.set()
        await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(
    app: App, *, max_connections: int = 10, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Connect]:
    server = HttpServer("127.0.0.1:0", max_connections=max_connections)
    await server.start(app, tls)
    host, _, port = server.address.partition(":")
    writers: list[asyncio.StreamWriter] = []

    async def connect(**options: Any) -> Stream:
        reader, writer = await asyncio.open_connection(host, int(port), **options)
        writers.append(writer)
        return reader, writer

    try:
        yield connect
    finally:
        app.go.set()
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await server.stop()


async def ask(stream: Stream, request: bytes = GET) -> bytes:
    """The beginning of the answer, all of which is read; nothing where the server has hung up."""
    reader, writer = stream
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(request)
        return (await reader.readuntil(END))[: len(OK)]
    return b""


async def hung_up(stream: Stream) -> bool:
    """Once it is so."""
    with suppress(ConnectionError):
        return await stream[0].read() == b""
    return True


async def trickle(stream: Stream, text: bytes) -> None:
    """Byte by byte, each well before the deadline, until nobody listens."""
    with suppress(ConnectionError):
        for byte in text:
            stream[1].write(bytes((byte,)))
            await stream[1].drain()
            await asyncio.sleep(SHORT_S / 10)


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "WAIT_S", SHORT_S)


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("begun", [b"", GET, POST], ids=["new", "after an answer", "after one too early"])
async def test_whoever_trickles_a_request_is_hung_up_on(begun: bytes) -> None:
    """A head that never ends, and a body that nobody reads any more."""
    async with serving(App()) as connect:
        stream = await connect()
        if begun:
            assert await ask(stream, begun) == OK
        trickling = asyncio.ensure_future(trickle(stream, b"G" * 1000))
        assert await hung_up(stream)
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)
        assert await ask(await connect()) == OK


@pytest.mark.usefixtures("short_wait")
async def test_whoever_is_answered_may_wait_for_long() -> None:
    app = App()
    async with serving(app) as connect:
        held = await connect()
        held[1].write(HOLD)
        idle = await connect()
        assert await hung_up(idle)
        app.go.set()
        assert await held[0].read(12) == OK


async def test_who_has_waited_longest_gives_way_to_a_new_one() -> None:
    async with serving(App(), max_connections=3) as connect:
        streams = [await connect() for _ in range(3)]
        for index in (1, 2, 0):
            assert await ask(streams[index]) == OK
        streams.append(await connect())
        assert await ask(streams[3]) == OK
        assert [await ask(streams[index]) == OK for index in (0, 1, 2)] == [True, False, True]


async def test_a_thousand_that_ask_nothing_shut_nobody_out() -> None:
    async with serving(App(), max_connections=8) as connect:
        idle = [await connect() for _ in range(1000)]
        assert await ask(await connect()) == OK
        assert sum([await ask(stream) == OK for stream in idle]) == 7


async def test_none_that_is_answered_gives_way() -> None:
    app = App()
    async with serving(app, max_connections=2) as connect:
        held = [await connect() for _ in range(2)]
        for _, writer in held:
            writer.write(HOLD)
        while await ask(await connect()) == OK:
            await asyncio.sleep(0.01)  # their requests have not come yet
        assert await hung_up(await connect())
        app.go.set()
        assert [await stream[0].read(12) for stream in held] == [OK, OK]
        assert await ask(await connect()) == OK


async def test_handshakes_that_never_end_count_and_give_way(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    context = server_context(TlsConfig(cert=pair.cert, key=pair.key, ca=authority.ca))
    client = ssl.create_default_context(cafile=authority.ca)
    async with serving(App(), max_connections=4, tls=context) as connect:
        silent = [await connect() for _ in range(4)]
        assert await ask(await connect(ssl=client)) == OK
        assert await hung_up(silent[0])


async def test_whoever_takes_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "WRITE_S", SHORT_S)
    app = App()
    async with serving(app) as connect:
        writer = (await connect(limit=1024))[1]
        writer.write(BULK)
        await app.was_left.wait()
        reader, writer = await connect()
        writer.write(BULK)
        assert len(await reader.readexactly(BULK_BYTES)) == BULK_BYTES, "who takes it may have it"
