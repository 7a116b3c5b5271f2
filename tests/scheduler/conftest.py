"""A lane computable by hand: the real scheduler, a rank that remembers what was written, a hash as model.

The rank keeps a cache of (position, token, path) and reads it through the page tables it was told, whenever
it samples. So a wrong page, a position that was skipped or computed by the wrong path shows at once.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from k2dist.cache import PagePool
from k2dist.ids import Generation, LaneId, PageId, RequestId, SeqId
from k2dist.messages import Event, FinishReason, NewSequence, Request, StepPlan, StepResult
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


@dataclass
class _Known:
    new: NewSequence
    tokens: list[int]
    pages: list[PageId] = field(default_factory=list)
    computed_len: int = 0


class FakeRank:
    """Does what a plan says and nothing else."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.cache: list[tuple[int, int, str] | None] = [None] * (num_pages * page_tokens)
        self.known: dict[SeqId, _Known] = {}

    def forget_all(self) -> None:
        self.cache = [None] * len(self.cache)
        self.known.clear()

    def run(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.released:
            del self.known[seq_id]
        for new in plan.new:
            assert new.seq_id not in self.known, "a known sequence was introduced again"
            self.known[new.seq_id] = _Known(new, [*new.prompt, *new.generated])
        for table in plan.page_tables:
            pages = self.known[table.seq_id].pages
            assert table.first == len(pages), "a page table has a hole"
            pages += table.pages
        samples = {}
        for grant in plan.grants:
            seq = self.known[grant.seq_id]
            end = grant.start + grant.num_tokens
            assert grant.num_tokens > 0
            assert grant.start == seq.computed_len, "a position was skipped or repeated"
            assert end <= len(seq.tokens), "a grant for a token nobody knows"
            self.write(seq, grant.start, end)
            assert grant.samples == (end == len(seq.tokens))
            if grant.samples:
                samples[grant.seq_id] = self.sample(seq)
        return StepResult(
            generation=plan.generation,
            step=plan.step,
            seq_ids=tuple(samples),
            token_ids=tuple(samples.values()),
            logprobs=(None,) * len(samples),
        )

    def write(self, seq: _Known, start: int, end: int) -> None:
        prompt_len = len(seq.new.prompt)
        assert end <= prompt_len or start >= prompt_len, "a grant mixes prompt and generated positions"
        path = "prompt" if end <= prompt_len else "decode"
        for position in range(start, end):
            self.cache[self.place(seq, position)] = (position, seq.tokens[position], path)
        seq.computed_len = end

    def sample(self, seq: _Known) -> int:
        prompt_len = len(seq.new.prompt)
        for position, token in enumerate(seq.tokens):
            path = "prompt" if position < prompt_len else "decode"
            assert self.cache[self.place(seq, position)] == (position, token, path), (
                f"position {position} is lost"
            )
        token = next_token(seq.tokens, seq.new.sampling.seed, seq.new.output_index)
        seq.tokens.append(token)
        return token

    def place(self, seq: _Known, position: int) -> int:
        page, offset = divmod(position, self.page_tokens)
        return seq.pages[page] * self.page_tokens + offset


class FakeLane:
    """Scheduler and rank, step by step; gathers the events and checks after each call."""

    def __init__(self, limits: Limits, *, num_pages: int, page_tokens: int, max_positions: int = 64) -> None:
        self.max_positions = max_positions
        self.scheduler = Scheduler(
            limits,
            PagePool(num_pages, page_tokens),
            end_token_ids=frozenset({END}),
            token_bytes=token_bytes,
            max_positions=max_positions,
        )
        self.rank = FakeRank(num_pages, page_tokens)
        self.answers: dict[tuple[RequestId, int], Answer] = {}
        self.plans: list[StepPlan] = []
        self.num_steps = 0

    def add(self, request: Request) -> None:
        events = self.scheduler.add(request, 0.0)
        for index in range(request.num_outputs):
            known = list(request.generated.get(index, ()))
            self.answers[request.request_id, index] = Answer(known)
        self.take(events)

    def abort(self, request_id: str) -> None:
        self.take(self.scheduler.abort(RequestId(request_id), 0.0))

    def lose_pages(self) -> None:
        self.rank.forget_all()
        self.scheduler.lose_pages()
        self.scheduler.check()

    def plan(self, *, prefill: bool = True) -> StepPlan:
        first = next(iter(self.scheduler._roster.running), None)
        plan = self.scheduler.plan(Generation(1), self.num_steps, 0.0, prefill=prefill)
        self.scheduler.check()
        self.num_steps += 1
        self.plans.append(plan)
        assert not {new.seq_id for new in plan.new} & set(plan.released), "preempted and admitted at once"
        if prefill:
            assert bool(plan.grants) == self.scheduler.has_work, "work, and nobody may do any"
            if first is not None:
                assert first.id in {grant.seq_id for grant in plan.grants}, "the first one stands still"
        return plan

    def commit(self, plan: StepPlan) -> tuple[Event, ...]:
        events = self.scheduler.commit(self.rank.run(plan), 0.0)
        self.take(events)
        return events

    def step(self, *, prefill: bool = True) -> tuple[StepPlan, tuple[Event, ...]]:
        plan = self.plan(prefill=prefill)
        return plan, self.commit(plan)

    def finish(self) -> None:
        """Step until nothing is left; everything must come home."""
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.step()
        load = self.scheduler.load(LaneId(0))
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.num_pages_free == load.num_pages, "a page did not come home"

    def take(self, events: Sequence[Event]) -> None:
        self.scheduler.check()
        for event in events:
            answer = self.answers[event.request_id, event.output_index]
            assert answer.finish is None, "an event after the end"
            assert event.first_index == len(answer.token_ids), "a gap"
            answer.token_ids += event.token_ids
            answer.finish, answer.stop_match = event.finish, event.stop_match
            if event.finish is not None:
                assert event.usage is not None
                assert event.usage.completion_tokens == len(answer.token_ids)


@pytest.fixture(scope="session")
def fake_lane() -> type[FakeLane]:
    return FakeLane


@pytest.fixture(scope="session")
def solo_answer():
    return solo
