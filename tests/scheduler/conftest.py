"""A lane computable by hand: the real scheduler, a rank that remembers what was written, a hash as model.

The rank keeps for every place in its cache whose tokens were computed there, which ones and by which path. It
reads them through the page tables it was told, whenever it samples. So a wrong page, a position that was lost
or computed by the wrong path, a shared page that was overwritten or holds other tokens shows at once.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from k2dist.cache import PageKey, PagePool, page_keys
from k2dist.ids import Generation, LaneId, PageId, RequestId, SeqId
from k2dist.messages import (
    Event,
    FinishReason,
    Grant,
    NewSequence,
    Request,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from k2dist.scheduler import Limits, Scheduler

VOCAB = 12
END = 0
LETTERS = b".abcdefghijk"


def token_bytes(token_id: int) -> bytes:
    """One letter, or that letter twice for every third token: stop strings begin and end inside tokens."""
    letter = LETTERS[token_id : token_id + 1]
    return letter * 2 if token_id % 3 == 0 else letter


def next_token(tokens: Sequence[int], seed: int, output_index: int) -> int:
    """The model: a pure function of all tokens so far."""
    return zlib.crc32(bytes([seed % 256, output_index, *tokens])) % VOCAB


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_match: str | int | None = None
    error: str = field(default="", compare=False)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, compare=False)
    cached_tokens: int = field(default=0, compare=False)


def solo(request: Request, output_index: int, max_positions: int) -> Answer:
    """What one output must be, computed without steps, pages or company."""
    sampling, answer = request.sampling, Answer()
    while answer.finish is None:
        tokens = answer.token_ids
        tokens.append(next_token([*request.prompt, *tokens], sampling.seed, output_index))
        may_stop = len(tokens) >= sampling.min_tokens
        text = b"".join(token_bytes(token) for token in tokens[max(sampling.min_tokens - 1, 0) :])
        if may_stop and (
            (tokens[-1] == END and not sampling.ignore_eos) or tokens[-1] in sampling.stop_token_ids
        ):
            answer.finish, answer.stop_match = FinishReason.STOP, tokens[-1]
        elif may_stop and (match := first_match(text, sampling.stop)):
            answer.finish, answer.stop_match = FinishReason.STOP, match
        elif len(tokens) == sampling.max_tokens or len(request.prompt) + len(tokens) == max_positions:
            answer.finish = FinishReason.LENGTH
    return answer


def first_match(text: bytes, stops: tuple[str, ...]) -> str | None:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop.encode())]
        if complete:
            return max(complete, key=len)
    return None


@dataclass(frozen=True)
class Place:
    """What was computed at one place of the cache: the last of `tokens`, after all the others."""

    tenant: str
    tokens: tuple[int, ...]
    path: str  # "prompt" or "decode"


@dataclass
class _Known:
    new: NewSequence
    tenant: str
    tokens: list[int]
    pages: list[PageId] = field(default_factory=list)
    computed_len: int = 0

    @property
    def prompt_len(self) -> int:
        return len(self.new.prompt)


class FakeRank:
    """Does what a plan says and nothing else. `mixes_paths`: a prompt may read what was generated."""

    def __init__(self, num_pages: int, page_tokens: int, *, mixes_paths: bool) -> None:
        self.page_tokens = page_tokens
        self.mixes_paths = mixes_paths
        self.tenants: dict[RequestId, str] = {}
        self.cache: list[Place | None] = [None] * (num_pages * page_tokens)
        self.known: dict[SeqId, _Known] = {}

    def forget_all(self) -> None:
        self.cache = [None] * len(self.cache)
        self.known.clear()

    def learn(self, plan: StepPlan) -> None:
        for seq_id in plan.released:
            del self.known[seq_id]
        for new in plan.new:
            assert new.seq_id not in self.known, "a known sequence was introduced again"
            tokens = [*new.prompt, *new.generated]
            self.known[new.seq_id] = _Known(new, self.tenants.get(new.request_id, ""), tokens)
        for table in plan.page_tables:
            pages = self.known[table.seq_id].pages
            assert table.first == len(pages), "a page table has a hole"
            pages += table.pages

    def run(self, plan: StepPlan) -> StepResult:
        self.learn(plan)
        samples, scores = {}, []
        for grant in plan.grants:
            seq = self.known[grant.seq_id]
            if grant.scores:
                scores.append(self.score(seq, grant))
            if self.compute(seq, grant):
                samples[grant.seq_id] = self.sample(seq)
        return StepResult(
            generation=plan.generation,
            step=plan.step,
            seq_ids=tuple(samples),
            token_ids=tuple(samples.values()),
            logprobs=(None,) * len(samples),
            prompt_logprobs=tuple(scores),
        )

    def compute(self, seq: _Known, grant: Grant) -> bool:
        """Write the granted positions; true if the grant samples."""
        end = grant.start + grant.num_tokens
        if not seq.computed_len and grant.start:
            assert grant.start % self.page_tokens == 0, "a prefix hit ends inside a page"
            seq.computed_len = grant.start
        assert grant.num_tokens > 0
        assert grant.start == seq.computed_len, "a position was skipped or repeated"
        assert end <= len(seq.tokens), "a grant for a token nobody knows"
        assert end <= seq.prompt_len or grant.start >= seq.prompt_len, "a grant mixes prompt and generated"
        for position in range(grant.start, end):
            page = seq.pages[position // self.page_tokens]
            holders = [other for other in self.known.values() if page in other.pages]
            assert holders == [seq], f"page {page} is shared and written"
            self.cache[self.place(seq, position)] = self.content(seq, position)
        seq.computed_len = end
        assert grant.samples == (end == len(seq.tokens))
        return grant.samples

    def content(self, seq: _Known, position: int) -> Place:
        path = "prompt" if position < seq.prompt_len else "decode"
        return Place(seq.tenant, tuple(seq.tokens[: position + 1]), path)

    def sample(self, seq: _Known) -> int:
        for position in range(len(seq.tokens)):
            found, wanted = self.cache[self.place(seq, position)], self.content(seq, position)
            assert found is not None, f"position {position} is not computed"
            assert (found.tenant, found.tokens) == (wanted.tenant, wanted.tokens), (
                f"position {position} is lost"
            )
            assert found.path == wanted.path or self.mixes_paths, f"position {position}: {found.path} path"
        token = next_token(seq.tokens, seq.new.sampling.seed, seq.new.output_index)
        seq.tokens.append(token)
        return token

    def score(self, seq: _Known, grant: Grant) -> tuple[TokenLogprob, ...]:
        """Of the prompt tokens after the granted positions: minus their position."""
        ends = range(grant.start + 1, min(grant.start + grant.num_tokens + 1, seq.prompt_len))
        return tuple(TokenLogprob(token_id=seq.tokens[end], logprob=-float(end)) for end in ends)

    def place(self, seq: _Known, position: int) -> int:
        page, offset = divmod(position, self.page_tokens)
        return seq.pages[page] * self.page_tokens + offset


class FakeLane:
    """Scheduler and rank, step by step, at `now_s`; gathers the events and checks after each call.

    `flying`: plans that are not committed. `step` leaves as many of them as there were: with one, each step
    is planned while the one before runs, as on a real lane.
    """

    def __init__(self, limits: Limits, *, num_pages: int, page_tokens: int, max_positions: int = 64) -> None:
        self.max_positions = max_positions
        self.pool = PagePool(num_pages, page_tokens)
        self.scheduler = Scheduler(
            limits,
            self.pool,
            end_token_ids=frozenset({END}),
            token_bytes=token_bytes,
            max_positions=max_positions,
        )
        self.rank = FakeRank(num_pages, page_tokens, mixes_paths=limits.reuse_generated)
        self.answers: dict[tuple[RequestId, int], Answer] = {}
        self.plans: list[StepPlan] = []
        self.flying: deque[StepPlan] = deque()
        self.seen: dict[PageId, tuple[PageKey, list[Place | None]]] = {}  # pages as they were last checked
        self.num_steps = 0
        self.now_s = 0.0

    def add(self, request: Request) -> None:
        events = self.scheduler.add(request, self.now_s)
        self.rank.tenants[request.request_id] = request.tenant
        for index in range(request.num_outputs):
            known = list(request.generated.get(index, ()))
            self.answers[request.request_id, index] = Answer(known)
        self.take(events)

    def abort(self, request_id: str, *, is_spoiled: bool = False) -> None:
        self.take(self.scheduler.abort(RequestId(request_id), is_spoiled=is_spoiled))

    def lose_pages(self) -> None:
        self.rank.forget_all()
        self.scheduler.lose_pages()
        self.flying.clear()
        self.check()

    def plan(self, *, prefill: bool = True) -> StepPlan:
        roster = self.scheduler._roster
        first = min(roster.decoding + roster.catching_up, key=lambda seq: seq.rank, default=None)
        is_kept = first is not None and not roster.finishing  # these keep their pages for one step more
        plan = self.scheduler.plan(Generation(1), self.num_steps, self.now_s, prefill=prefill)
        self.check()
        self.num_steps += 1
        self.plans.append(plan)
        self.flying.append(plan)
        self.learn_empty()
        assert not {new.seq_id for new in plan.new} & set(plan.released), "preempted and admitted at once"
        if prefill:
            assert self.num_flying or not self.scheduler.has_work, "work, and nobody may do any"
            if first is not None and is_kept:
                assert first.id in {grant.seq_id for grant in plan.grants}, "the first one stands still"
        return plan

    def commit(self) -> tuple[Event, ...]:
        """The oldest step that is planned."""
        events = self.scheduler.commit(self.rank.run(self.flying.popleft()), self.now_s)
        self.learn_empty()
        self.take(events)
        return events

    @property
    def num_flying(self) -> int:
        return sum(bool(plan.grants) for plan in self.flying)

    def learn_empty(self) -> None:
        """Plans without grants are applied in their turn, and not committed."""
        while self.flying and not self.flying[0].grants:
            self.rank.learn(self.flying.popleft())

    def step(self, *, prefill: bool = True) -> tuple[StepPlan, tuple[Event, ...]]:
        num_flying = self.num_flying
        plan = self.plan(prefill=prefill)
        return plan, self.commit() if self.num_flying > num_flying else ()

    def finish(self) -> None:
        """Step until nothing is left; everything must come home."""
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            if self.num_flying == 2 or (not self.step()[0].grants and self.flying):
                self.commit()
        while self.flying:
            self.commit()
        load = self.scheduler.load(LaneId(0))
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.num_pages_free == load.num_pages, "a page did not come home"

    def take(self, events: Sequence[Event]) -> None:
        self.check()
        for event in events:
            answer = self.answers[event.request_id, event.output_index]
            assert answer.finish is None, "an event after the end"
            assert event.first_index == len(answer.token_ids), "a gap"
            if event.prompt_logprobs:
                assert event.first_prompt_index == len(answer.prompt_logprobs) + 1, "a gap in the prompt"
                assert not answer.token_ids, "prompt logprobs come before all tokens"
            answer.prompt_logprobs += event.prompt_logprobs
            answer.token_ids += event.token_ids
            answer.finish, answer.stop_match, answer.error = event.finish, event.stop_match, event.error
            if event.finish is not None:
                assert event.usage is not None
                assert event.usage.completion_tokens == len(answer.token_ids)
                answer.cached_tokens = event.usage.cached_tokens

    def check(self) -> None:
        self.scheduler.check()
        self.published()

    def published(self) -> set[tuple[str, tuple[int, ...]]]:
        """Every prefix that can be hit, (tenant, tokens), after a check that its page holds just that."""
        found = set()
        for page in map(PageId, range(self.pool.num_pages)):
            key = self.pool.key_of(page)
            if key is not None:
                start = page * self.pool.page_tokens
                places = self.rank.cache[start : start + self.pool.page_tokens]
                seen, seen_places = self.seen.get(page, (None, []))
                if seen != key or any(a is not b for a, b in zip(places, seen_places, strict=True)):
                    self.check_page(page, key, places)
                    self.seen[page] = (key, places)
                found.add((places[-1].tenant, places[-1].tokens))
        return found

    def check_page(self, page: PageId, key: PageKey, places: list[Place | None]) -> None:
        """It holds what its key says, and only that."""
        last = places[-1]
        assert last is not None, f"page {page} is published and not computed"
        for offset, place in enumerate(reversed(places)):
            assert place is not None
            assert place.tokens == last.tokens[: len(last.tokens) - offset], f"page {page} is mixed"
            assert place.path == "prompt" or self.rank.mixes_paths, f"page {page} was generated"
        assert [*page_keys(last.tenant, last.tokens, self.pool.page_tokens)][-1] == key, f"page {page} lies"

    def hits(self, prompt: tuple[int, ...], tenant: str) -> int:
        """The slow twin of `cached_prefix_len`: page after page, compared token by token."""
        published, end = self.published(), self.pool.page_tokens
        while end < len(prompt) and (tenant, prompt[:end]) in published:
            end += self.pool.page_tokens
        return end - self.pool.page_tokens


@pytest.fixture(scope="session")
def fake_lane() -> type[FakeLane]:
    return FakeLane


@pytest.fixture(scope="session")
def solo_answer():
    return solo
