"""One lane's scheduler: requests in, a plan per step out, tokens back, events out.

There are no phases. A sequence lags by `known_len - computed_len`; a step lets it catch up as far as tokens
and pages reach. Prompts in chunks, preemption and recovery are all "computed_len changed".

    add ──> waiting ──plan: pages and a place──> running ──commit: the token that ends it──> gone
               ^                                    │
               └── preempted: pages freed, computed_len = 0, tokens kept ──┘

Rules that others rely on:
- `plan` and `commit` alternate. A plan without grants may be left uncommitted (an idle lane takes no step).
- A rank applies a plan in this order: released, new, page_tables, grants.
- A page goes back to the pool only once the step that last wrote it is committed. As plan and commit
  alternate, both may free at once; `abort` during a step leaves its pages until that step's commit.
- The token that ends an output (end token, stop id, last one of a stop string) is one of its tokens and is
  in its events, so that positions are gapless and a log can be rebuilt; whoever makes text drops it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from msgspec import structs

from k2dist.cache import PagePool
from k2dist.errors import CapacityError, RequestError
from k2dist.ids import Generation, LaneId, RequestId, SeqId
from k2dist.messages import (
    Event,
    FinishReason,
    Grant,
    LaneLoad,
    PageTable,
    Request,
    StepPlan,
    StepResult,
)
from k2dist.scheduler.limits import Limits
from k2dist.scheduler.refuse import refuse_impossible
from k2dist.scheduler.roster import Roster
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
        self._roster = Roster(pages, limits.max_running)
        self._rules = EndRules(end_token_ids, token_bytes, max_positions)
        self._outputs: dict[RequestId, list[Sequence]] = {}  # of requests with an output that goes on
        self._flight: tuple[StepPlan, dict[SeqId, Sequence]] | None = None  # planned, not committed
        self._numbers = count()

    # -- requests --------------------------------------------------------------------------------------

    def add(self, request: Request, now_s: float) -> tuple[Event, ...]:
        """Take a request, or raise for it alone: `RequestError` if wrong, `CapacityError` if too many wait.

        Tokens in `request.generated` are known and not emitted again. An output that has ended by them does
        not run; its end is the event returned. Otherwise the result is empty.
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
        outputs = [self._begin(request, index) for index in range(request.num_outputs)]
        for seq in outputs:
            if seq.end is None:
                self._outputs[request.request_id] = outputs
                self._roster.enqueue(seq)
        return tuple(seq.event(len(seq.generated)) for seq in outputs if seq.end is not None)

    def abort(self, request_id: RequestId, now_s: float) -> tuple[Event, ...]:
        """End a request's outputs now; unknown ids are left alone. Its pages are free at the next plan."""
        events = []
        for seq in self._outputs.get(request_id, ()):
            if seq.end is None:
                seq.end = End(FinishReason.ABORT)
                self._remove(seq)
                events.append(seq.event(len(seq.generated)))
        self._outputs.pop(request_id, None)
        return tuple(events)

    def lose_pages(self) -> None:
        """The cache is gone and the ranks forgot all sequences: keep tokens, undo a step in flight."""
        self._flight = None
        self._roster.forget_ranks()

    # -- steps -----------------------------------------------------------------------------------------

    def plan(self, generation: Generation, step: int, now_s: float, *, prefill: bool = True) -> StepPlan:
        """Decide the next step. Equal histories and equal `now_s` give an equal plan; an empty one is a plan.

        Tokens: first one to each decoding sequence, then chunks to those that catch up, then to new ones.
        Pages: in rank order, as needed for this step's tokens only; who lacks one takes them from the last.
        Without `prefill` only generated positions are granted, one per sequence, and nobody is admitted.
        """
        assert self._flight is None or not self._flight[0].grants, "the last plan is not committed"
        running = self._roster.running
        grants = self._grant_running(self._share_tokens(prefill=prefill))
        if prefill:
            grants += self._admit(self._limits.step_tokens - sum(grant.num_tokens for grant in grants))
        granted = {grant.seq_id for grant in grants}
        seqs = [seq for seq in running if seq.id in granted]
        plan = StepPlan(
            generation=generation,
            step=step,
            released=self._roster.take_released(),
            new=tuple(seq.introduction() for seq in seqs if not seq.is_known),
            page_tables=tuple(_tell_pages(seq) for seq in seqs if len(seq.pages) > seq.num_pages_told),
            grants=tuple(grants),
        )
        for seq in seqs:
            seq.is_known = True
        self._flight = (plan, {seq.id: seq for seq in seqs})
        return plan

    def commit(self, result: StepResult, now_s: float) -> tuple[Event, ...]:
        """Take what the planned step produced: positions now in the cache, a token per sampling grant."""
        assert self._flight is not None, "nothing is planned"
        plan, seqs = self._flight
        sampled = tuple(grant.seq_id for grant in plan.grants if grant.samples)
        assert (result.generation, result.step) == (plan.generation, plan.step), f"{result} is not of {plan}"
        assert result.seq_ids == sampled, f"sampled {result.seq_ids}, planned {sampled}"
        self._flight = None
        for grant in plan.grants:
            seqs[grant.seq_id].computed_len = grant.start + grant.num_tokens
        events = []
        for seq_id, token_id, logprob in zip(sampled, result.token_ids, result.logprobs, strict=True):
            seq = seqs[seq_id]
            if seq.end is None:
                seq.append(token_id)
                events.append(seq.event(len(seq.generated) - 1, () if logprob is None else (logprob,)))
                if seq.end is not None:
                    self._finish(seq)
        self._roster.settle()
        return tuple(events)

    # -- facts -----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._outputs)

    @property
    def wants_prefill(self) -> bool:
        """Whether, as of the last commit, a plan with `prefill` would do more than one without."""
        return any(not seq.is_decoding for seq in self._roster.running) or self._roster.fits_next()

    def load(self, lane: LaneId) -> LaneLoad:
        return LaneLoad(
            lane=lane,
            num_running=len(self._roster.running),
            num_waiting=len(self._roster.waiting),
            num_pages=self._roster.pool.num_pages,
            num_pages_free=self._roster.pool.num_free,
        )

    def live(self) -> tuple[Request, ...]:
        """Every request that goes on, with all its tokens so far in `generated`: what another lane can `add`.

        Outputs that have ended are in it too: `add` sees by their tokens that they have.
        """
        return tuple(
            structs.replace(
                outputs[0].request, generated={seq.output_index: tuple(seq.generated) for seq in outputs}
            )
            for outputs in self._outputs.values()
        )

    # -- adding and removing ---------------------------------------------------------------------------

    def _begin(self, request: Request, output_index: int) -> Sequence:
        number = next(self._numbers)
        return Sequence.begin(SeqId(number), request, output_index, number, self._rules)

    def _finish(self, seq: Sequence) -> None:
        self._remove(seq)
        outputs = self._outputs[seq.request.request_id]
        if all(output.end is not None for output in outputs):
            del self._outputs[seq.request.request_id]

    def _remove(self, seq: Sequence) -> None:
        self._roster.remove(seq, is_in_flight=self._flight is not None and seq.id in self._flight[1])

    # -- planning --------------------------------------------------------------------------------------

    def _share_tokens(self, *, prefill: bool) -> dict[SeqId, int]:
        """How many positions each running sequence may compute by the tokens alone; pages come later."""
        shares: dict[SeqId, int] = {}
        for seq in self._roster.running:
            if seq.is_decoding or (not prefill and seq.computed_len >= seq.prompt_len):
                shares[seq.id] = 1
        if prefill:
            budget = self._limits.step_tokens - len(shares)
            for seq in self._roster.running:
                if seq.id not in shares:
                    shares[seq.id] = min(seq.extent, self._limits.chunk_tokens, budget)
                    budget -= shares[seq.id]
        return shares

    def _grant_running(self, shares: dict[SeqId, int]) -> list[Grant]:
        """Grants in rank order, as far as pages reach."""
        grants = []
        for seq in self._roster.running:  # preemption shortens the list from its end, always behind `seq`
            num_tokens = self._roster.secure(seq, shares.get(seq.id, 0))
            if num_tokens > 0:
                grants.append(_grant(seq, num_tokens))
        return grants

    def _admit(self, budget: int) -> list[Grant]:
        """First chunks of waiting sequences, strictly in rank order: who does not fit is not overtaken."""
        grants = []
        while budget > 0 and self._roster.fits_next():
            seq = self._roster.start_next()
            num_tokens = self._roster.secure(seq, min(seq.extent, self._limits.chunk_tokens, budget))
            grants.append(_grant(seq, num_tokens))
            budget -= num_tokens
        return grants

    # -- invariants ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls; tests call it after each."""
        self._roster.check()
        going_on = [seq.id for outputs in self._outputs.values() for seq in outputs if seq.end is None]
        listed = [seq.id for seq in self._roster.running + self._roster.waiting]
        assert sorted(going_on) == sorted(listed), "a sequence is lost"
        if self._flight is None or not self._flight[0].grants:
            self._roster.check_settled()
        else:
            num_tokens = sum(grant.num_tokens for grant in self._flight[0].grants)
            assert num_tokens <= self._limits.step_tokens, f"{num_tokens} tokens in a step"


def _grant(seq: Sequence, num_tokens: int) -> Grant:
    end = seq.computed_len + num_tokens
    return Grant(seq_id=seq.id, start=seq.computed_len, num_tokens=num_tokens, samples=end == seq.known_len)


def _tell_pages(seq: Sequence) -> PageTable:
    first, seq.num_pages_told = seq.num_pages_told, len(seq.pages)
    return PageTable(seq_id=seq.id, first=first, pages=tuple(seq.pages[first:]))
