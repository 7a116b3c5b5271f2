"""A lane's port: events stay until acknowledged, facts until `retain_s`, and a failure ends every stream."""

import threading
from collections.abc import Callable

import pytest

from k2dist.cache import PagePool
from k2dist.engine import LanePort
from k2dist.ids import Generation, LaneId, RequestId
from k2dist.messages import Event, FinishReason, Request, Sampling, StepPlan, StepResult
from k2dist.scheduler import Limits, Scheduler

END = 99


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def port(clock: Clock) -> LanePort:
    scheduler = Scheduler(
        Limits(step_tokens=16, chunk_tokens=8, max_running=4, max_waiting=4),
        PagePool(16, 4),
        end_token_ids=frozenset({END}),
        token_bytes=lambda token_id: bytes([token_id]),
        max_positions=64,
    )
    return LanePort(
        LaneId(0), scheduler, vocab_size=100, retain_s=10, check_constraint=lambda _: None, clock=clock
    )


def request(name: str, *, max_tokens: int = 3, num_outputs: int = 1) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt=(1, 2, 3),
        sampling=Sampling(max_tokens=max_tokens),
        num_outputs=num_outputs,
    )


def step(port: LanePort, number: int, token: Callable[[int], int] = lambda i: 10 + i) -> StepPlan:
    """One step whose i-th sampled token is `token(i)`."""
    plan = port.plan(Generation(0), number)
    if not plan.grants:
        return plan
    sampled = tuple(grant.seq_id for grant in plan.grants if grant.samples)
    port.commit(
        StepResult(
            generation=plan.generation,
            step=number,
            seq_ids=sampled,
            token_ids=tuple(token(i) for i in range(len(sampled))),
            logprobs=(None,) * len(sampled),
        )
    )
    return plan


def tokens(events: tuple[Event, ...]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def test_events_stay_until_acknowledged(port: LanePort) -> None:
    port.admit((request("a"),))
    step(port, 0)
    step(port, 1)
    first = port.events(0, 0.0)
    assert tokens(first.events) == [10, 10]
    assert port.events(0, 0.0) == first, "asking again loses nothing"
    assert port.events(first.next, 0.0).events == ()
    step(port, 2)
    rest = port.events(first.next, 0.0)
    assert tokens(rest.events) == [10]
    assert rest.events[-1].finish is FinishReason.LENGTH
    assert port.events(0, 0.0) == rest, "what was acknowledged is gone"


def test_a_waiting_reader_wakes_with_the_first_event(port: LanePort) -> None:
    got: list[Event] = []
    reader = threading.Thread(target=lambda: got.extend(port.events(0, 30.0).events))
    reader.start()
    port.admit((request("a"),))
    step(port, 0)
    reader.join(10)
    assert tokens(tuple(got)) == [10]


@pytest.mark.parametrize("is_spoiled", [True, False])
def test_an_ended_request_says_whether_a_retry_can_help(port: LanePort, is_spoiled: bool) -> None:
    """Wrong numbers are this lane's fault; a constraint that no token satisfies is stuck on every lane."""
    port.admit((request("a"), request("b")))
    step(port, 0)
    port.end({RequestId("a"): "it broke"}, is_spoiled=is_spoiled)
    (last,) = (event for event in port.events(0, 0.0).events if event.finish is not None)
    assert (last.request_id, last.finish, last.error) == ("a", FinishReason.ERROR, "it broke")
    assert last.retry_can_help is is_spoiled
    port.fail("the generation ended")
    (other,) = (event for event in port.events(0, 0.0).events if event.request_id == "b" and event.finish)
    assert other.retry_can_help


def test_facts_are_kept_until_retain_s_after_the_end(port: LanePort, clock: Clock) -> None:
    port.admit((request("a", max_tokens=1),))
    step(port, 0)
    port.events(port.events(0, 0.0).next, 0.0)
    (live,) = port.live()
    assert live.outputs[0].token_ids == (10,)
    assert live.outputs[0].finish is FinishReason.LENGTH
    clock.now_s = 9.0
    assert port.live()
    clock.now_s = 11.0
    assert port.live() == ()


def test_the_same_request_again_is_not_doubled(port: LanePort) -> None:
    for _ in range(2):
        (reply,) = port.admit((request("a"),))
        assert reply.error == ""
    assert port.load().num_waiting == 1
    (reply,) = port.admit((request("a", max_tokens=7),))
    assert reply.field == "request_id"


def test_recovered_tokens_are_facts_and_not_emitted_again(port: LanePort) -> None:
    recovered = Request(
        request_id=RequestId("r"), prompt=(1,), sampling=Sampling(max_tokens=3), generated={0: (7, 8)}
    )
    port.admit((recovered,))
    step(port, 0)
    step(port, 1)
    events = port.events(0, 0.0).events
    assert [(event.first_index, event.token_ids) for event in events] == [(2, (10,))]
    assert port.live()[0].outputs[0].token_ids == (7, 8, 10)


def test_a_cancelled_request_ends_once_and_its_pages_come_home(port: LanePort) -> None:
    port.admit((request("a", num_outputs=2),))
    step(port, 0)
    port.cancel((RequestId("a"), RequestId("unknown")))
    port.cancel((RequestId("a"),))
    step(port, 1)
    ends = [event.finish for event in port.events(0, 0.0).events if event.finish]
    assert ends == [FinishReason.ABORT] * 2
    assert port.load().num_pages_free == 16


def test_a_failure_ends_every_stream_and_takes_no_more(port: LanePort) -> None:
    port.admit((request("a"), request("b")))
    step(port, 0)
    port.fail("rank 1 died")
    ends = [event for event in port.events(0, 0.0).events if event.finish]
    assert [(event.request_id, event.finish, event.error) for event in ends] == [
        ("a", FinishReason.ERROR, "rank 1 died"),
        ("b", FinishReason.ERROR, "rank 1 died"),
    ]
    (reply,) = port.admit((request("c"),))
    assert reply.retry_can_help
    assert reply.error == "rank 1 died"


def test_ids_outside_the_vocabulary_are_refused(port: LanePort) -> None:
    (reply,) = port.admit((Request(request_id=RequestId("a"), prompt=(1, 100), sampling=Sampling()),))
    assert reply.field == "prompt"
    assert "100" in reply.error


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=float("nan")),
        Sampling(top_p=0.0),
        Sampling(min_p=1.5),
        Sampling(repetition_penalty=0.0),
        Sampling(logit_bias={100: 1.0}),
        Sampling(stop_token_ids=(-1,)),
        Sampling(logprobs=21),
        Sampling(stop=("",)),
        Sampling(min_tokens=300),
    ],
)
def test_sampling_out_of_range_is_refused_at_admission(port: LanePort, sampling: Sampling) -> None:
    (reply,) = port.admit((Request(request_id=RequestId("a"), prompt=(1,), sampling=sampling),))
    assert reply.field.startswith("sampling.")
    assert not reply.retry_can_help


def test_draining_refuses_new_requests_and_finishes_old_ones(port: LanePort) -> None:
    port.admit((request("a", max_tokens=1),))
    port.drain()
    (reply,) = port.admit((request("b"),))
    assert "drain" in reply.error
    step(port, 0)
    assert not port.has_work
