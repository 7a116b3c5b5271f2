"""A lane with the real scheduler and a model that is computable by hand.

The next token is the last one plus 1: after "a" comes "b". After "z", and after byte 255, comes <|im_end|>;
after any special token comes "a", so the answer to a conversation is the alphabet. `script` replaces this:
it is given the prompt and returns the whole answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from k2dist.cache import PagePool
from k2dist.errors import CapacityError, PeerError, RequestError, UnavailableError
from k2dist.ids import Generation, LaneId, RequestId, SeqId
from k2dist.messages import (
    AdmitReply,
    Event,
    EventBatch,
    Grant,
    LaneLoad,
    LiveRequest,
    NewSequence,
    Request,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from k2dist.scheduler import Limits, Scheduler
from k2dist.text.tokenizer import IM_END, Tokenizer, end_token_ids

Script = Callable[[tuple[int, ...]], list[int]]


class FakeLane:
    """Steps every `step_s`, in the event loop that `start` was called in."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        lane: int = 0,
        script: Script | None = None,
        step_s: float = 0.0,
        limits: Limits | None = None,
        num_pages: int = 64,
        page_tokens: int = 16,
    ) -> None:
        self.lane = LaneId(lane)
        self.cancelled: list[RequestId] = []
        self.num_steps = 0
        self.admit_gate = asyncio.Event()  # admissions wait for it
        self.admit_gate.set()
        self.reply: AdmitReply | None = None  # instead of the scheduler's own
        self._im_end = tokenizer.special_id(IM_END)
        self._tokenizer = tokenizer
        self._script = script
        self._step_s = step_s
        self._pages = PagePool(num_pages, page_tokens)
        self._scheduler = Scheduler(
            limits or Limits(),
            self._pages,
            end_token_ids=end_token_ids(tokenizer, None),
            token_bytes=tokenizer.text_bytes,
            max_positions=num_pages * page_tokens,
        )
        self._sequences: dict[SeqId, tuple[NewSequence, list[int]]] = {}
        self._events: list[Event] = []
        self._grown = asyncio.Event()
        self._lost: PeerError | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def die(self, message: str) -> None:
        """From now on every call raises PeerError."""
        self._lost = PeerError(message)
        self._grown.set()

    async def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        await self.admit_gate.wait()
        self._check_alive()
        return tuple(self.reply or self._admit(request) for request in requests)

    async def cancel(self, ids: tuple[RequestId, ...]) -> None:
        self._check_alive()
        for request_id in ids:
            self.cancelled.append(request_id)
            self._publish(self._scheduler.abort(request_id))

    async def events(self, after: int) -> EventBatch:
        while after >= len(self._events):
            self._check_alive()
            self._grown.clear()
            await self._grown.wait()
        self._check_alive()
        return EventBatch(next=len(self._events), events=tuple(self._events[after:]))

    async def live(self) -> tuple[LiveRequest, ...]:
        raise NotImplementedError("no coordinator is restarted in these tests")

    async def load(self) -> LaneLoad:
        self._check_alive()
        return self._scheduler.load(self.lane)

    async def drain(self) -> None:
        self._check_alive()

    @property
    def num_pages_used(self) -> int:
        return self._pages.num_pages - self._pages.num_free

    def _admit(self, request: Request) -> AdmitReply:
        try:
            self._scheduler.add(request, time.monotonic())
        except RequestError as error:
            return AdmitReply(request_id=request.request_id, error=str(error), field=error.field)
        except (CapacityError, UnavailableError) as error:
            return AdmitReply(request_id=request.request_id, error=str(error), retry_can_help=True)
        return AdmitReply(request_id=request.request_id)

    async def _run(self) -> None:
        while self._lost is None:
            await asyncio.sleep(self._step_s if self._scheduler.has_work else 0.001)
            plan = self._scheduler.plan(Generation(0), self.num_steps, time.monotonic())
            result = self._step(plan)
            if plan.grants:
                self._publish(self._scheduler.commit(result, time.monotonic()))
            self._scheduler.check()
            self.num_steps += 1

    def _step(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.released:
            del self._sequences[seq_id]
        for new in plan.new:
            self._sequences[new.seq_id] = (new, list(new.generated))
        sampled = [grant.seq_id for grant in plan.grants if grant.samples]
        tokens = [self._next(seq_id) for seq_id in sampled]
        logprobs = [self._logprob(seq_id, token) for seq_id, token in zip(sampled, tokens, strict=True)]
        return StepResult(
            generation=plan.generation,
            step=plan.step,
            seq_ids=tuple(sampled),
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            prompt_logprobs=tuple(self._scores(grant) for grant in plan.grants if grant.scores),
        )

    def _scores(self, grant: Grant) -> tuple[TokenLogprob, ...]:
        """Of the prompt tokens after the granted positions: -1 less a hundredth of the token."""
        prompt = self._sequences[grant.seq_id][0].prompt
        tokens = prompt[grant.start + 1 : grant.start + grant.num_tokens + 1]
        return tuple(TokenLogprob(token_id=token, logprob=-1.0 - token / 100) for token in tokens)

    def _next(self, seq_id: SeqId) -> int:
        new, generated = self._sequences[seq_id]
        if self._script is not None:
            token = self._script(new.prompt)[len(generated)]
        else:
            token = self._successor(generated[-1] if generated else new.prompt[-1])
        generated.append(token)
        return token

    def _successor(self, token: int) -> int:
        if token >= 256:
            return ord("a")
        return self._im_end if token in (ord("z"), 255) else token + 1

    def _logprob(self, seq_id: SeqId, token: int) -> TokenLogprob | None:
        num_rivals = self._sequences[seq_id][0].sampling.logprobs
        if num_rivals is None:
            return None
        top = tuple((token + i, -0.5 - i) for i in range(num_rivals))
        return TokenLogprob(token_id=token, logprob=-0.5, top=top)

    def _publish(self, events: tuple[Event, ...]) -> None:
        self._events += events
        if events:
            self._grown.set()

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise self._lost
