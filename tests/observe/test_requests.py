"""A request's way is told by its events: times, counts by tenant, phases without a gap."""

from __future__ import annotations

import timeit

import pytest

from k2dist.ids import RequestId
from k2dist.messages import Course, Event, FinishReason, Request, Sampling
from k2dist.observe import Journey, RequestBook
from k2dist.observe.requests import MAX_TENANTS, OTHER_TENANTS

COURSE = Course(queued_s=0.5, cached_tokens=2, num_chunks=3, num_preemptions=1)


def ask(name: str, *, outputs: int = 1, tenant: str = "") -> Request:
    return Request(
        request_id=RequestId(name),
        prompt=(1, 2, 3, 4),
        sampling=Sampling(),
        num_outputs=outputs,
        tenant=tenant,
    )


def tokens(name: str, first: int, count: int, *, output: int = 0, ends: FinishReason | None = None) -> Event:
    return Event(
        request_id=RequestId(name),
        output_index=output,
        first_index=first,
        token_ids=tuple(range(count)),
        finish=ends,
        course=COURSE if first == 0 or ends else None,
    )


def test_the_times_of_one_request() -> None:
    ended: list[Journey] = []
    book = RequestBook(ended.append)
    book.arrive(ask("a"), 10.0, 1_000.0)
    book.send("a", 1, 11.0)
    book.accept("a", 11.25)
    book.note(tokens("a", 0, 1), 13.0)
    book.note(tokens("a", 1, 2), 13.5)
    book.note(tokens("a", 3, 1, ends=FinishReason.STOP), 14.0)
    facts = book.facts()
    assert facts.first_token_s.total == 3.0
    assert facts.next_token_s.total == pytest.approx(1.0)
    assert sum(facts.next_token_s.counts) == 3
    assert facts.whole_s.total == 4.0
    assert facts.queue_s.total == 1.5  # 1 s here and 0.5 in the lane
    assert facts.prefill_s.total == 1.5
    assert facts.decode_s.total == 1.0
    assert facts.num_ended == {"stop": 1}
    (tenant,) = facts.tenants
    assert (tenant.num_prompt_tokens, tenant.num_cached_tokens, tenant.num_generated_tokens) == (4, 2, 4)
    assert tenant.num_requests == {"success": 1}
    (journey,) = ended
    assert [tuple(phase) for phase in journey.phases()] == [
        ("queue", 0.0, 1.0),
        ("admission", 1.0, 1.25),
        ("prefill", 1.25, 3.0),
        ("decode", 3.0, 4.0),
    ]
    trace = book.trace("a")
    assert trace is not None
    assert (trace.arrived_at, trace.lane, trace.ended_s) == (1_000.0, 1, 4.0)
    (output,) = trace.outputs
    assert (output.first_token_s, output.last_token_s, output.num_tokens) == (3.0, 4.0, 4)
    assert (output.finish, output.course) == ("stop", COURSE)
    book.forget("a")
    assert book.trace("a") is None


def test_a_request_ends_with_its_last_output() -> None:
    ended: list[Journey] = []
    book = RequestBook(ended.append)
    book.arrive(ask("a", outputs=2), 0.0, 0.0)
    book.send("a", 0, 0.0)
    book.accept("a", 0.0)
    book.note(tokens("a", 0, 5, ends=FinishReason.LENGTH), 1.0)
    assert ended == []
    book.note(tokens("a", 0, 3, output=1, ends=FinishReason.ERROR), 2.0)
    assert len(ended) == 1
    facts = book.facts()
    assert facts.num_ended == {"length": 1, "error": 1}
    assert facts.tenants[0].num_requests == {"error": 1}
    assert sum(facts.whole_s.counts) == 0, "a broken answer has no latency"


def test_a_refused_request_ends_where_it_was() -> None:
    ended: list[Journey] = []
    book = RequestBook(ended.append)
    book.arrive(ask("a"), 0.0, 0.0)
    book.refuse("a", "full", 3.0)
    book.refuse("a", "twice", 4.0)
    (journey,) = ended
    assert [tuple(phase) for phase in journey.phases()] == [("queue", 0.0, 3.0)]
    assert journey.error == "full"
    assert book.facts().tenants[0].num_requests == {"refused": 1}
    assert book.trace("a") is None


def test_names_of_tenants_are_bounded() -> None:
    book = RequestBook()
    for number in range(2 * MAX_TENANTS):
        book.arrive(ask(str(number), tenant=str(number)), 0.0, 0.0)
        book.refuse(str(number), "full", 0.0)
    by_name = {tenant.tenant: tenant.num_requests["refused"] for tenant in book.facts().tenants}
    assert len(by_name) == MAX_TENANTS + 1
    assert by_name[OTHER_TENANTS] == MAX_TENANTS


def test_an_event_of_an_unknown_request_is_left_alone() -> None:
    book = RequestBook()
    book.note(tokens("a", 0, 1), 1.0)
    assert book.facts().tenants == ()


def cost_of_a_token_s() -> float:
    """Of one event with one token, in the middle of an answer. No test: see the README's figures."""
    book = RequestBook()
    book.arrive(ask("a"), 0.0, 0.0)
    book.send("a", 0, 0.0)
    book.accept("a", 0.0)
    book.note(tokens("a", 0, 1), 1.0)
    event, number = tokens("a", 1, 1), 200_000
    return min(timeit.repeat(lambda: book.note(event, 1.025), number=number, repeat=3)) / number
