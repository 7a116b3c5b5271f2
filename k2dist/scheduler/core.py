"""One lane's scheduler: requests in, a plan per step out, tokens back, events out.

There are no phases. A sequence lags by `known_len - computed_len`; a step lets it catch up as far as tokens
and pages reach. Prompts in chunks, prefix hits, preemption and recovery are all "computed_len changed".

    add ──> waiting ──plan: pages and a place──> running ──commit: the token that ends it──> gone
               ^                                    │
               └── preempted: pages freed, computed_len = 0, tokens kept ──┘

Rules that others rely on:
- Steps run in the order of their plans, and are committed in it. `plan` may be one step ahead of `commit`: it
  counts on the tokens that the step under way will sample, without knowing them. A plan without grants is not
  committed.
- A rank applies a plan in this order: released, new, page_tables, grants. A grant may begin at the token that
  the step before samples. Tokens sampled for a sequence that a later plan released count for nothing.
- A page is shared only when the step that filled it is committed: a prefix hit is of what is computed.
- The token that ends an output (end token, stop id, last one of a stop string) is one of its tokens and is
  in its events, so that positions are gapless and a log can be rebuilt; whoever makes text drops it.
- Whoever runs out of time ends with FinishReason.TIMEOUT and an error that says so.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from itertools import count

from msgspec import structs

from k2dist.cache import PagePool, page_keys
from k2dist.errors import CapacityError, RequestError
from k2dist.ids import Generation, LaneId, RequestId, SeqId
from k2dist.messages import (
    Event,
    FinishReason,
    Grant,
    LaneLoad,
    NewSequence,
    Request,
    StepPlan,
    StepResult,
)
from k2dist.scheduler.deadlines import Deadlines
from k2dist.scheduler.flight import Flight
from k2dist.scheduler.limits import Limits
from k2dist.scheduler.policy import rank
from k2dist.scheduler.refuse import refuse_impossible
from k2dist.scheduler.roster import Roster, by_rank
from k2dist.scheduler.sequence import End, EndRules, Sequence


class Scheduler:
    """See the module. Not thread-safe: one caller at a time.

    end_token_ids: the model's own end tokens. token_bytes: a token's text, for stop strings.
    max_positions: prompt and output together. Output is refused, never cut, where the pages of the whole lane
    would not hold it.
    """

    def __init__(
        self,
        limits: Limits,
        pages: PagePool,
        *,
        end_token_ids: frozenset[int],
        token_bytes: Callable[[int], bytes],
        max_positions: int,
    ) -> None:
        self._limits = limits
        self._roster = Roster(pages, limits)
        self._rules = EndRules(end_token_ids, token_bytes, max_positions)
        self._outputs: dict[RequestId, list[Sequence]] = {}  # of requests with an output that goes on
        self._deadlines = Deadlines()
        self._flights: deque[Flight] = deque()  # planned with grants, not committed; two at most
        self._num_steps = 0  # committed
        self._numbers = count()

    # -- requests --------------------------------------------------------------------------------------

    def add(self, request: Request, now_s: float) -> tuple[Event, ...]:
        """Take a request, or raise for it alone: `RequestError` if wrong, `CapacityError` if too many wait.

        Tokens in `request.generated` are known and not emitted again. An output that has ended by them does
        not run; its end is the event returned. Otherwise the result is empty. Its `timeout_s` begins now.
        """
        if request.request_id in self._outputs:
            raise RequestError("request_id", f"{request.request_id!r} is in use; take another")
        refuse_impossible(request, self._limits, self._roster.pool, self._rules.max_positions)
        num_waiting = len(self._roster.waiting)
        if num_waiting + request.num_outputs > self._limits.max_waiting:
            raise CapacityError(
                f"{num_waiting} sequences wait and {request.num_outputs} more would pass "
                f"scheduler.max_waiting={self._limits.max_waiting}; try again later"
            )
        outputs = [self._begin(request, index, now_s) for index in range(request.num_outputs)]
        going_on = [seq for seq in outputs if seq.end is None]
        for seq in going_on:
            self._roster.waiting.add(seq, now_s)
        if going_on:
            self._outputs[request.request_id] = outputs
            if request.timeout_s is not None:
                self._deadlines.start(request.request_id, now_s + request.timeout_s)
        return tuple(seq.event(len(seq.generated)) for seq in outputs if seq.end is not None)

    def abort(self, request_id: RequestId, *, is_spoiled: bool = False) -> tuple[Event, ...]:
        """End a request's outputs now; unknown ids are left alone. Its pages are free at the next plan.

        `is_spoiled`: it got wrong numbers, so nothing that is cached is found again: others may have built
        on its pages, or it on theirs.
        """
        if is_spoiled:
            self._roster.pool.forget_prefixes()
        return self._cut_off(request_id, End(FinishReason.ABORT))

    def expire(self, now_s: float) -> tuple[Event, ...]:
        """End the requests whose time is up. `commit` does; a caller may in between, when no step comes."""
        events: list[Event] = []
        for request_id in self._deadlines.due(now_s):
            timeout_s = self._outputs[request_id][0].request.timeout_s
            error = f"its timeout_s={timeout_s:g} has passed; allow more, or ask less"
            events += self._cut_off(request_id, End(FinishReason.TIMEOUT, error=error))
        return tuple(events)

    def lose_pages(self) -> None:
        """The cache is gone and the ranks forgot all sequences: keep tokens, undo the steps in flight."""
        self._flights.clear()
        self._roster.forget_ranks()

    # -- steps -----------------------------------------------------------------------------------------

    def plan(self, generation: Generation, step: int, now_s: float, *, prefill: bool = True) -> StepPlan:
        """Decide the next step. Equal histories and equal `now_s` give an equal plan; an empty one is a plan.

        At most one step may be planned and not committed. Whoever waits for that step alone, because it
        brings the last token, is granted nothing.

        Tokens: first one to each decoding sequence, then chunks to those that catch up, then to new ones.
        Pages: in rank order, as needed for this step's tokens only; who lacks one takes them from the last.
        Without `prefill` only generated positions are granted, one per sequence, and nobody is admitted; nor
        is anybody when pages were so short that somebody lost them: it would be the next to lose them.
        """
        assert len(self._flights) < 2, "the plan before the last one is not committed"
        roster, flight = self._roster, Flight()
        budget = self._limits.step_tokens - len(roster.decoding)
        shares = self._share_chunks(budget) if prefill else self._share_singles()
        num_running = roster.num_running
        self._grant_running(flight, shares)
        is_short = roster.num_running < num_running
        new = self._admit(flight, budget - sum(shares.values()), now_s) if prefill and not is_short else []
        flight.plan = StepPlan(
            generation=generation,
            step=step,
            released=roster.take_released(),
            new=tuple(new),
            page_tables=roster.take_page_tables(),
            grants=tuple(flight.grants),
        )
        if flight.grants:
            self._flights.append(flight)
        return flight.plan

    def commit(self, result: StepResult, now_s: float) -> tuple[Event, ...]:
        """Take what the oldest planned step produced: its positions are in the cache, a token per sampling
        grant. Then whoever has run out of time ends: the step's token is the last one.
        """
        assert self._flights, "nothing is planned"
        self._flights[0].check_result(result)
        flight = self._flights.popleft()
        self._num_steps += 1
        events = _score(flight, result)
        for seq, grant in flight.chunks:
            if seq.end is None and seq.held_len:
                self._roster.publish(seq, grant.start, grant.start + grant.num_tokens)
        ended: list[Sequence] = []
        for seq, token_id, logprob in zip(flight.sampling, result.token_ids, result.logprobs, strict=True):
            if seq.end is None and seq.held_len:  # else it was ended or preempted meanwhile
                events.append(seq.take(token_id, logprob))
                if seq.end is not None:
                    ended.append(seq)
        self._let_go(ended)
        return (*events, *self.expire(now_s))

    # -- facts -----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._outputs)

    def cached_prefix_len(self, prompt: tuple[int, ...], tenant: str) -> int:
        """How many of the first tokens of `prompt` a request of `tenant` would find computed now.

        At most all but the last one. For a router: it changes nothing, and promises nothing.
        """
        page_tokens = self._roster.pool.page_tokens
        return len(self._roster.pool.find(page_keys(tenant, prompt[:-1], page_tokens))) * page_tokens

    def load(self, lane: LaneId) -> LaneLoad:
        return LaneLoad(
            lane=lane,
            num_running=self._roster.num_running,
            num_waiting=len(self._roster.waiting),
            num_tokens_waiting=self._roster.waiting.num_tokens,
            num_pages=self._roster.pool.num_pages,
            num_pages_free=self._roster.pool.num_free,
            num_pages_cached=self._roster.pool.num_idle,
            num_steps=self._num_steps,
            num_preemptions=self._roster.num_preemptions,
            num_prompt_tokens=self._roster.num_prompt_tokens,
            num_cached_tokens=self._roster.num_cached_tokens,
        )

    def live(self) -> tuple[Request, ...]:
        """Every request that goes on, with all its tokens so far in `generated`: what another lane can `add`.

        Outputs that have ended are in it too: `add` sees by their tokens that they have. `timeout_s` is what
        it was; who adds it elsewhere takes off what has passed.
        """
        return tuple(
            structs.replace(
                outputs[0].request, generated={seq.output_index: tuple(seq.generated) for seq in outputs}
            )
            for outputs in self._outputs.values()
        )

    # -- adding and removing ---------------------------------------------------------------------------

    def _begin(self, request: Request, output_index: int, now_s: float) -> Sequence:
        number = next(self._numbers)
        place = rank(now_s, request.priority, number, self._limits.ageing_s)
        return Sequence.begin(SeqId(number), request, output_index, place, self._rules, now_s=now_s)

    def _cut_off(self, request_id: RequestId, end: End) -> tuple[Event, ...]:
        """End the outputs of a request that go on, if it does."""
        events = []
        for seq in self._outputs.pop(request_id, ()):
            if seq.end is None:
                seq.end = end
                self._roster.remove(seq)
                events.append(seq.event(len(seq.generated)))
        self._deadlines.discard(request_id)
        return tuple(events)

    def _let_go(self, ended: list[Sequence]) -> None:
        """A step is committed: of those that ended by it."""
        for seq in ended:
            self._roster.remove(seq)
            outputs = self._outputs.get(seq.request_id, ())
            if all(output.end is not None for output in outputs):  # several may end in one step
                self._outputs.pop(seq.request_id, None)
                self._deadlines.discard(seq.request_id)

    # -- planning --------------------------------------------------------------------------------------

    def _share_chunks(self, budget: int) -> dict[SeqId, int]:
        """How many positions those that catch up may compute by the tokens alone; pages come later."""
        shares: dict[SeqId, int] = {}
        for seq in self._roster.catching_up:
            if budget <= 0:
                break
            shares[seq.id] = min(seq.extent, self._limits.chunk_tokens, budget)
            budget -= shares[seq.id]
        return shares

    def _share_singles(self) -> dict[SeqId, int]:
        """One position each to those that catch up on generated tokens, where no prompt may be computed."""
        return {seq.id: 1 for seq in self._roster.catching_up if seq.computed_len >= seq.prompt_len}

    def _grant_running(self, flight: Flight, shares: dict[SeqId, int]) -> None:
        """Grants in rank order, as far as pages reach."""
        roster, order = self._roster, [*self._roster.decoding]
        publishes_all = self._limits.reuse_generated
        if shares:
            order = sorted([*order, *(seq for seq in roster.catching_up if seq.id in shares)], key=by_rank)
        num_turned, last_offset = 0, roster.pool.page_tokens - 1
        for seq in order:
            if not seq.held_len:
                break  # its pages went to one before it, and so did those of all behind it
            start = seq.computed_len
            if not seq.is_decoding or publishes_all:
                num_tokens = roster.secure(seq, shares.get(seq.id, 1))
                if num_tokens > 0:
                    self._grant(flight, seq, num_tokens)
            elif start < seq.held_len or roster.secure(seq, 1):  # as `_grant`, faster
                flight.grants.append(Grant(seq_id=seq.id, start=start, num_tokens=1, samples=True))
                flight.sampling.append(seq)
                flight.seq_ids.append(seq.id)
                seq.computed_len, seq.known_len = start + 1, start + 2
                if start + 2 == seq.max_len:
                    roster.finish(seq)
                elif not (start + 2) & last_offset:  # page_tokens is a power of two
                    num_turned += 1
        roster.turned(num_turned)

    def _grant(self, flight: Flight, seq: Sequence, num_tokens: int) -> None:
        flight.add(seq, num_tokens)
        self._roster.advance(seq, num_tokens)

    def _admit(self, flight: Flight, budget: int, now_s: float) -> list[NewSequence]:
        """First chunks of waiting sequences, strictly in their order: who does not fit is not overtaken."""
        started = []
        while budget > 0 and (hits := self._roster.next_fit()) is not None:
            seq = self._roster.start_next(hits, now_s)
            num_tokens = self._roster.secure(seq, min(seq.extent, self._limits.chunk_tokens, budget))
            started.append(seq.introduction())
            self._grant(flight, seq, num_tokens)
            budget -= num_tokens
        return started

    # -- invariants ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls; tests call it after each."""
        roster = self._roster
        roster.check()
        going_on = [seq.id for outputs in self._outputs.values() for seq in outputs if seq.end is None]
        running = roster.decoding + roster.catching_up + roster.finishing
        listed = [seq.id for seq in running] + roster.waiting.ids()
        assert sorted(going_on) == sorted(listed), "a sequence is lost"
        self._deadlines.check(set(self._outputs))
        promised = Counter(seq.id for flight in self._flights for seq in flight.sampling if seq.held_len)
        for seq in running:
            assert seq.known_len == seq.taken_len + promised[seq.id], f"sequence {seq.id} counts wrongly"
        for flight in self._flights:
            num_tokens = sum(grant.num_tokens for grant in flight.grants)
            assert num_tokens <= self._limits.step_tokens, f"{num_tokens} tokens in a step"


def _score(flight: Flight, result: StepResult) -> list[Event]:
    """Events of the prompt logprobs that the step produced."""
    scoring = [(seq, grant) for seq, grant in flight.chunks if grant.scores]
    events: list[Event] = []
    for (seq, grant), logprobs in zip(scoring, result.prompt_logprobs, strict=True):
        events += seq.score(grant.start + 1, logprobs)
    return events
