"""HTTP connections within bounds: how many there are, how long one may ask nothing, or take nothing.

    accepted, TLS handshake ──> waits for a request: `WAIT_S` until the head has come whole <──┐
                                        v                                                      │
                                is answered ──────────────────────────> the response is written

While it is answered, its body has a deadline of its own (`http_app`), and a client that takes nothing of what
is written for `WRITE_S` is hung up on. What trickles in byte by byte moves no deadline. Where there are as
many connections as there may be, a new one takes the place of the one that has waited longest: whoever opens
many and asks nothing shuts nobody out.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

WAIT_S = 60.0  # the pools of OpenAI's and Anthropic's clients keep idle connections for 5 s
WRITE_S = 120.0


class Listener(socket.socket):
    """A listening socket that counts what it has accepted, from before the TLS handshake to the end."""

    def __init__(self, family: socket.AddressFamily, max_open: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._max_open = max_open
        self._open: dict[int, _Connection] = {}  # by file descriptor
        self._waiting: dict[int, None] = {}  # those that wait for a request, in the order in which they began

    @property
    def num_open(self) -> int:
        return len(self._open)

    def accept(self) -> tuple[socket.socket, Any]:
        """ConnectionAbortedError: every one of `max_open` is being answered, so this one was hung up on."""
        plain, address = super().accept()
        connection = _Connection(fileno=plain.detach())
        if len(self._open) >= self._max_open and not self._give_way():
            connection.close()
            raise ConnectionAbortedError("as many HTTP connections as there may be are being answered")
        connection.listener = self
        self._open[connection.fileno()] = connection
        self.note(connection.fileno(), is_waiting=True)
        return connection, address

    def note(self, number: int, *, is_waiting: bool) -> None:
        """The connection waits for a request from now on, or is answered."""
        self._waiting.pop(number, None)
        if is_waiting and number in self._open:
            self._waiting[number] = None

    def forget(self, number: int) -> None:
        self._open.pop(number, None)
        self._waiting.pop(number, None)

    def _give_way(self) -> bool:
        """Hang up on the one that has waited longest: its transport finds the end of the stream. False: none
        waits."""
        number = next(iter(self._waiting), None)
        if number is None:
            return False
        connection = self._open[number]
        self.forget(number)
        connection.listener = None
        connection.shutdown(socket.SHUT_RDWR)
        return True


class _Connection(socket.socket):
    listener: Listener | None = None  # that counts it

    def close(self) -> None:
        if self.listener is not None:
            self.listener.forget(self.fileno())
            self.listener = None
        super().close()


class Connection(H11Protocol):
    """uvicorn's side of one connection, with the deadlines of this module. Make it as uvicorn does, by its
    own keywords, with `listener` before them."""

    def __init__(self, listener: Listener, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._listener = listener
        self._number = -1
        self._waits_until: asyncio.TimerHandle | None = None
        self._writes_until: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._number = transport.get_extra_info("socket").fileno()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._waits_until, self._writes_until):
            if timer is not None:
                timer.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writes_until = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writes_until is not None:
            self._writes_until.cancel()
            self._writes_until = None

    def _look(self) -> None:
        """Whether it waits for a request has changed, or not."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting == (self._waits_until is not None):
            return
        self._listener.note(self._number, is_waiting=is_waiting)
        if self._waits_until is not None:
            self._waits_until.cancel()
            self._waits_until = None
        else:
            self._waits_until = self.loop.call_later(WAIT_S, self.transport.close)
