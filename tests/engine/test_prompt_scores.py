"""Each prompt token's logprob goes out once, in order, whatever is computed again; pages are never shared."""

import pytest

from k2dist.cache import PagePool
from k2dist.ids import Generation, RequestId
from k2dist.messages import Event, Request, Sampling, StepPlan, StepResult, TokenLogprob
from k2dist.scheduler import Limits, Scheduler

PROMPT = tuple(range(20, 31))


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(
        Limits(step_tokens=16, chunk_tokens=4, max_running=4, max_waiting=8),
        PagePool(16, 4),
        end_token_ids=frozenset(),
        token_bytes=lambda token_id: bytes([token_id]),
        max_positions=64,
    )


def add(scheduler: Scheduler, name: str, *, num_outputs: int = 1, generated: tuple[int, ...] = ()) -> None:
    request = Request(
        request_id=RequestId(name),
        prompt=PROMPT,
        sampling=Sampling(max_tokens=3, prompt_logprobs=0),
        num_outputs=num_outputs,
        generated={0: generated} if generated else {},
    )
    scheduler.add(request, 0.0)


def step(scheduler: Scheduler, number: int) -> tuple[StepPlan, tuple[Event, ...]]:
    plan = scheduler.plan(Generation(0), number, 0.0)
    scheduler.check()
    sampled = tuple(grant.seq_id for grant in plan.grants if grant.samples)
    scored = (range(g.start, min(g.start + g.num_tokens, len(PROMPT) - 1)) for g in plan.grants if g.scores)
    result = StepResult(
        generation=plan.generation,
        step=number,
        seq_ids=sampled,
        token_ids=(7,) * len(sampled),
        logprobs=(None,) * len(sampled),
        prompt_logprobs=tuple(
            tuple(TokenLogprob(token_id=PROMPT[p + 1], logprob=-1.0) for p in positions)
            for positions in scored
        ),
    )
    events = scheduler.commit(result, 0.0) if plan.grants else ()
    scheduler.check()
    return plan, events


def scores(events: tuple[Event, ...] | list[Event]) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (event.first_prompt_index, tuple(one.token_id for one in event.prompt_logprobs))
        for event in events
        if event.prompt_logprobs
    ]


def test_they_come_chunk_by_chunk(scheduler: Scheduler) -> None:
    add(scheduler, "a")
    assert scores(step(scheduler, 0)[1]) == [(1, PROMPT[1:5])]
    assert scores(step(scheduler, 1)[1]) == [(5, PROMPT[5:9])]
    _, last = step(scheduler, 2)
    assert scores(last) == [(9, PROMPT[9:])], "the last prompt token's row samples"
    assert [event.token_ids for event in last] == [(), (7,)], "before the first token"
    plan, events = step(scheduler, 3)
    assert scores(events) == []
    assert not any(grant.scores for grant in plan.grants)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_what_is_computed_again_is_not_said_again(scheduler: Scheduler, num_steps: int) -> None:
    add(scheduler, "a")
    events = [event for number in range(num_steps) for event in step(scheduler, number)[1]]
    scheduler.lose_pages()
    events += [event for number in range(num_steps, num_steps + 4) for event in step(scheduler, number)[1]]
    said = [token_id for _, token_ids in scores(events) for token_id in token_ids]
    assert said == list(PROMPT[1:])
    firsts = [first for first, _ in scores(events)]
    assert firsts == sorted(firsts)
    assert [token_id for event in events for token_id in event.token_ids][:2] == [7, 7]


def test_only_output_0_has_them_and_none_after_a_recovery(scheduler: Scheduler) -> None:
    add(scheduler, "a", num_outputs=2)
    add(scheduler, "b", generated=(7,))
    events = [event for number in range(8) for event in step(scheduler, number)[1]]
    scored = [event for event in events if event.prompt_logprobs]
    assert {(event.request_id, event.output_index) for event in scored} == {("a", 0)}
    assert sum(len(event.prompt_logprobs) for event in scored) == len(PROMPT) - 1


def test_they_take_no_prefix_hits(scheduler: Scheduler) -> None:
    """The same prompt again: all its positions are computed again, as all its rows need logits."""
    computed = []
    for name in "ab":
        add(scheduler, name)
        plans = [step(scheduler, number)[0] for number in range(6)]
        computed.append(sum(grant.num_tokens for plan in plans for grant in plan.grants if grant.scores))
    assert computed == [len(PROMPT)] * 2
