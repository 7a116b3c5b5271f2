"""One request in the coordinator: where it stands and who reads it. Its tokens are in the request log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from k2dist.coordinator import Account, RequestLog
from k2dist.errors import K2Error
from k2dist.ids import LaneId
from k2dist.messages import Event, Request
from k2dist.service.error_codes import UnknownRequestError
from k2dist.service.owned_ids import outer_id

N = TypeVar("N")


class Submission(Generic[N]):
    """`note` is whatever the caller wants to find with the request again.

    Until `accept` or `refuse` it waits, in the queue or on its way to a lane. Events that overtake the lane's
    reply are kept in `early`.
    """

    def __init__(
        self, request: Request, note: N, *, is_detached: bool, account: Account | None = None
    ) -> None:
        self.request = request
        self.note = note
        self.is_detached = is_detached
        self._account = account
        self.lane: LaneId | None = None
        self.refusal: K2Error | None = None
        self.early: list[Event] = []
        self.readers: set[Reader[N]] = set()

    @property
    def is_unwanted(self) -> bool:
        """Nobody reads it, and it was not meant to run unread."""
        return not self.readers and not self.is_detached

    def accept(self, lane: LaneId) -> None:
        self.lane = lane
        self.wake()

    def refuse(self, error: K2Error) -> None:
        self.refusal = error
        self.wake()

    def pay(self, num_tokens: int, now_s: float) -> None:
        """Its caller has had these tokens computed."""
        if self._account is not None and num_tokens > 0:
            self._account.pay_tokens(num_tokens, now_s)

    def wake(self) -> None:
        """Something changed: its state, or the log."""
        for reader in self.readers:
            reader.wake()


class Reader(Generic[N]):
    """One place in one request's answer. Each output has a cursor, and the log is read at the reader's pace.

    A slow reader therefore delays nobody, and finds in one event what a fast one gets in many.
    """

    def __init__(
        self, submission: Submission[N], log: RequestLog, leave: Callable[[Submission[N]], None]
    ) -> None:
        self.request = submission.request
        self.note = submission.note
        self._submission = submission
        self._log = log
        self._leave = leave
        self._cursors = [0] * submission.request.num_outputs
        self._prompt_cursor = 1  # the next prompt token whose logprob is to be read
        self._open = set(range(submission.request.num_outputs))
        self._changed = asyncio.Event()
        submission.readers.add(self)

    def close(self) -> None:
        """Stop reading. The last one to do so ends the request, unless it is detached or has ended."""
        if self in self._submission.readers:
            self._submission.readers.remove(self)
            self._leave(self._submission)

    def wake(self) -> None:
        self._changed.set()

    async def accepted(self) -> LaneId:
        """The lane that took the request; raises what it was refused with."""
        while self._submission.lane is None:
            if self._submission.refusal is not None:
                raise self._submission.refusal
            self._changed.clear()
            await self._changed.wait()
        return self._submission.lane

    def skip(self, output_index: int, start: int) -> Event:
        """Begin this output at token `start`; gives the tokens passed over. RequestError: it has fewer."""
        self._log.tail(self.request.request_id, output_index, start)  # checks both numbers
        self._cursors[output_index] = start
        whole = self._log.tail(self.request.request_id, output_index, 0)
        return Event(
            request_id=self.request.request_id,
            output_index=output_index,
            first_index=0,
            token_ids=whole.token_ids[:start],
        )

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events of all outputs from their cursors on, the last of each with its end."""
        while self._open:
            self._changed.clear()  # before looking: what comes now sets it again
            for event in self._ready():
                yield event
            if self._open:
                await self._changed.wait()

    def _ready(self) -> Iterator[Event]:
        request_id = self.request.request_id
        for output_index in sorted(self._open):
            if request_id not in self._log:
                raise UnknownRequestError(
                    "request_id", f"{outer_id(request_id)} was read so slowly that it is forgotten"
                )
            event = self._log.tail(
                request_id,
                output_index,
                self._cursors[output_index],
                from_prompt_index=self._prompt_cursor,
            )
            self._cursors[output_index] += len(event.token_ids)
            self._prompt_cursor += len(event.prompt_logprobs)
            if event.finish is not None:
                self._open.remove(output_index)
            if event.token_ids or event.prompt_logprobs or event.finish is not None:
                yield event
