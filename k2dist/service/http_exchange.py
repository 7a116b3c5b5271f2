"""One HTTP request that generates: the gRPC streams behind it, and the response while its client is there.

    body ── read ──> Call ── Generate, or Resume from Last-Event-ID ──> events ── writer ──> one JSON, or SSE

A client that leaves ends its request (unless it is `detached`), because the gRPC stream is closed with it. A
client that reads slowly is waited for: each stream has its own small queue, and the coordinator's log is
read at this one's pace, so nobody else waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from k2dist.errors import K2Error, UnavailableError
from k2dist.service.answer_events import AnswerEnd, AnswerEvent, Failed, Finished
from k2dist.service.error_codes import AbortedError
from k2dist.service.http_errors import ErrorReply
from k2dist.service.http_metrics import AnswerClock
from k2dist.service.sse import HEARTBEAT, Frame, Numbering, Step, write_frame

HEARTBEAT_S = 15.0  # a stream is never silent for longer, or proxies would cut it
_QUEUE = 16  # events of one response that wait for a slow reader; the others stay in the coordinator's log

Events = AsyncGenerator[AnswerEvent]


class _Beat:
    """In the queue of a stream to which nothing has come for long."""


class StreamWriter(Protocol):
    def push(self, prompt_index: int, event: AnswerEvent) -> Iterator[Step]: ...


class WholeWriter(Protocol):
    def push(self, prompt_index: int, event: AnswerEvent) -> None: ...

    def response(self) -> dict[str, Any]: ...


class Call(Protocol):
    """One request, translated. `events`: a stream for each prompt."""

    clock: AnswerClock
    is_streamed: bool

    async def open(self) -> Sequence[Events]:
        """Streams that are not begun; raises what can be refused before."""
        ...

    def stream_writer(self) -> tuple[StreamWriter, Numbering]: ...

    def whole_writer(self) -> WholeWriter: ...

    def end_of_stream(self) -> bytes:
        """What follows the last event."""
        ...

    def error_frame(self, body: dict[str, Any]) -> Frame: ...

    def refusal(self, error: K2Error) -> ErrorReply:
        """The error in the API's form and the client's own words."""
        ...


class Exchange(Response):
    """The response to a `Call`; it runs for as long as the client stays."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._answer(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            self._call.clock.end("abort")  # unless it was answered whole
        finally:
            self._call.clock.end("error")  # a bug, unless it has ended in another way
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, send: Send) -> None:
        call = self._call
        is_begun = False
        try:
            async with _merged(await call.open()) as events:
                first = await anext(events)
                if not call.is_streamed:
                    await _send_json(send, 200, await self._gather(first, events))
                    call.clock.end("success")  # here: a client that has all of it may leave at once
                    return
                is_begun = True
                await _send_start(send, 200, b"text/event-stream", ((b"cache-control", b"no-store"),))
                await self._stream(first, events, send)
                await send({"type": "http.response.body", "body": call.end_of_stream()})
                call.clock.end("success")
        except K2Error as error:
            call.clock.end("error")
            reply = call.refusal(error)
            if is_begun:
                body = write_frame(call.error_frame(reply.body))
                await send({"type": "http.response.body", "body": body})
            else:
                await send_error(send, reply)

    async def _gather(
        self, first: tuple[int, AnswerEvent] | None, events: AsyncIterator[tuple[int, AnswerEvent] | None]
    ) -> dict[str, Any]:
        writer = self._call.whole_writer()
        entry = first
        while True:
            if entry is not None:
                _check(entry[1])
                writer.push(*entry)
            try:
                entry = await anext(events)
            except StopAsyncIteration:
                return writer.response()

    async def _stream(
        self,
        first: tuple[int, AnswerEvent] | None,
        events: AsyncIterator[tuple[int, AnswerEvent] | None],
        send: Send,
    ) -> None:
        writer, numbering = self._call.stream_writer()

        async def show(entry: tuple[int, AnswerEvent] | None) -> None:
            body = HEARTBEAT
            if entry is not None:
                _check(entry[1])
                body = b"".join(shown for step in writer.push(*entry) for shown in numbering.push(step))
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await show(first)
        async for entry in events:
            await show(entry)


async def send_error(send: Send, reply: ErrorReply) -> None:
    more = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
    await _send_json(send, reply.status, reply.body, more)


async def _send_json(
    send: Send, status: int, body: dict[str, Any], headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    data = msgspec.json.encode(body)
    length = (b"content-length", b"%d" % len(data))
    await _send_start(send, status, b"application/json", (length, *headers))
    await send({"type": "http.response.body", "body": data})


async def _send_start(
    send: Send, status: int, content_type: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", content_type), *headers],
        }
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check(event: AnswerEvent) -> None:
    """Raise what an event means that says that there will be no whole answer."""
    if isinstance(event, Failed):
        message = f"the answer broke off: {event.message}"
        raise UnavailableError(message) if event.retryable else K2Error(message)
    if isinstance(event, Finished) and event.reason is AnswerEnd.ABORTED:
        raise AbortedError("the request was aborted")


@asynccontextmanager
async def _merged(
    streams: Sequence[Events],
) -> AsyncIterator[AsyncGenerator[tuple[int, AnswerEvent] | None]]:
    """Events of all streams as they come, each with its stream's number; None where none came for long.

    The first event is never None: until there is one, what a request is refused with is still to come.
    """
    queue: asyncio.Queue[tuple[int, AnswerEvent] | K2Error | _Beat | None] = asyncio.Queue(_QUEUE)
    num_read = 0

    async def pump(index: int, events: Events) -> None:
        async with aclosing(events):
            try:
                async for event in events:
                    await queue.put((index, event))
            except K2Error as error:
                await queue.put(error)
            else:
                await queue.put(None)

    async def beat() -> None:
        """By itself: a timer for each event would cost as much as half of its way through here."""
        nonlocal num_read
        while True:
            before = num_read
            await asyncio.sleep(HEARTBEAT_S / 2)
            if num_read == before and queue.empty():
                queue.put_nowait(_Beat())

    async def read() -> AsyncGenerator[tuple[int, AnswerEvent] | None]:
        nonlocal num_read
        num_open = len(streams)
        while num_open > 0:
            item = await queue.get()
            if isinstance(item, _Beat):
                for task in pumps:
                    if task.done():
                        task.result()  # a bug in it is not waited for
                if num_read > 0:
                    yield None
                continue
            num_read += 1
            if item is None:
                num_open -= 1
            elif isinstance(item, K2Error):
                raise item
            else:
                yield item

    pumps = [asyncio.ensure_future(pump(index, events)) for index, events in enumerate(streams)]
    beating = asyncio.ensure_future(beat())
    try:
        async with aclosing(read()) as merged:
            yield merged
    finally:
        for task in (*pumps, beating):
            task.cancel()
        await asyncio.gather(*pumps, beating, return_exceptions=True)
