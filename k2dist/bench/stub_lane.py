"""A lane that computes nothing: at each of its steps every output gets one more token, all the same.

For `k2dist bench gateway` only, which measures what carries tokens and not what makes them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from k2dist.ids import LaneId, RequestId
from k2dist.messages import (
    AdmitReply,
    Event,
    EventBatch,
    FinishReason,
    LaneLoad,
    LiveRequest,
    Request,
    Usage,
)

_LONGEST_S = 1.0  # how long a lane without work keeps its reader waiting
_LATE_S = 0.1  # what a step may be behind before the pace begins anew


@dataclass(slots=True)
class _Output:
    request_id: RequestId
    index: int
    prompt_len: int
    num_left: int
    num_made: int = 0


class StubLane:
    """`tokens_per_s`: of all outputs together, asked before each step. `note`: told how many it made."""

    def __init__(
        self, token_id: int, tokens_per_s: Callable[[], float], note: Callable[[int], object]
    ) -> None:
        self._token_ids = (token_id,)
        self._tokens_per_s = tokens_per_s
        self._note = note
        self._outputs: list[_Output] = []
        self._has_work = asyncio.Event()
        self._due_s = 0.0
        self._num_steps = 0

    async def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        for request in requests:
            for index in range(request.num_outputs):
                self._outputs.append(
                    _Output(request.request_id, index, len(request.prompt), request.sampling.max_tokens)
                )
        self._has_work.set()
        return tuple(AdmitReply(request_id=request.request_id) for request in requests)

    async def cancel(self, ids: tuple[RequestId, ...]) -> None:
        self._keep([output for output in self._outputs if output.request_id not in ids])

    async def events(self, after: int) -> EventBatch:
        """The next step's, when it is due."""
        try:
            async with asyncio.timeout(_LONGEST_S):
                await self._has_work.wait()
        except TimeoutError:
            return EventBatch(next=after, events=())
        now_s = time.perf_counter()
        step_s = len(self._outputs) / self._tokens_per_s()
        self._due_s += step_s
        if self._due_s < now_s - _LATE_S:
            self._due_s = now_s
        await asyncio.sleep(max(self._due_s - now_s, 0.0))
        events = tuple(map(self._next, self._outputs))
        self._keep([output for output in self._outputs if output.num_left > 0])
        self._num_steps += 1
        self._note(len(events))
        return EventBatch(next=after + len(events), events=events)

    async def live(self) -> tuple[LiveRequest, ...]:
        raise NotImplementedError("its coordinator is never restarted")

    async def load(self) -> LaneLoad:
        return LaneLoad(
            lane=LaneId(0),
            num_running=len(self._outputs),
            num_waiting=0,
            num_pages=0,
            num_pages_free=0,
            num_steps=self._num_steps,
        )

    async def drain(self) -> None:
        pass

    def _keep(self, outputs: list[_Output]) -> None:
        self._outputs = outputs
        if not outputs:
            self._has_work.clear()

    def _next(self, output: _Output) -> Event:
        first_index = output.num_made
        output.num_made += 1
        output.num_left -= 1
        is_last = output.num_left == 0
        return Event(
            request_id=output.request_id,
            output_index=output.index,
            first_index=first_index,
            token_ids=self._token_ids,
            finish=FinishReason.LENGTH if is_last else None,
            usage=Usage(prompt_tokens=output.prompt_len, completion_tokens=output.num_made)
            if is_last
            else None,
        )
