"""Who is next: by priority, then by turns among tenants; never more than fit, never after the deadline."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.coordinator import Admission
from k2dist.errors import CapacityError, ConfigError, RequestError
from k2dist.messages import Request, Sampling


def request(name: str, tenant: str = "", priority: int = 0) -> Request:
    return Request(request_id=name, prompt=(1,), sampling=Sampling(), tenant=tenant, priority=priority)


def names(requests: tuple[Request, ...]) -> list[str]:
    return [request.request_id for request in requests]


def test_first_come_first_served_within_a_tenant() -> None:
    queue = Admission(8)
    for name in "abc":
        queue.offer(request(name), 0.0, deadline_s=9.0)
    assert names(queue.take(2, 1.0).ready) == ["a", "b"]
    assert names(queue.take(2, 1.0).ready) == ["c"]


def test_tenants_take_turns() -> None:
    queue = Admission(8)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.offer(request(name, tenant=name[0]), 0.0, deadline_s=9.0)
    assert names(queue.take(8, 1.0).ready) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_turn_taken_is_remembered_while_the_tenant_waits() -> None:
    queue = Admission(8)
    for name in ("a1", "a2", "b1"):
        queue.offer(request(name, tenant=name[0]), 0.0, deadline_s=9.0)
    assert names(queue.take(1, 1.0).ready) == ["a1"]
    queue.offer(request("c1", tenant="c"), 1.0, deadline_s=9.0)
    assert names(queue.take(8, 1.0).ready) == ["b1", "a2", "c1"]


def test_higher_priority_goes_first_whatever_the_turns() -> None:
    queue = Admission(8)
    for name, priority in (("a", 0), ("b", 2), ("c", -1), ("d", 2)):
        queue.offer(request(name, tenant=name, priority=priority), 0.0, deadline_s=9.0)
    assert names(queue.take(8, 1.0).ready) == ["b", "d", "a", "c"]


def test_who_waits_past_the_deadline_is_not_admitted() -> None:
    queue = Admission(8)
    queue.offer(request("late"), 0.0, deadline_s=5.0)
    queue.offer(request("good"), 0.0, deadline_s=6.0)
    assert queue.next_deadline_s() == 5.0
    admitted = queue.take(1, 5.0)
    assert (names(admitted.ready), names(admitted.expired)) == (["good"], ["late"])
    assert queue.next_deadline_s() is None


def test_without_room_only_deadlines_count() -> None:
    queue = Admission(8)
    queue.offer(request("a"), 0.0, deadline_s=5.0)
    assert queue.take(0, 4.0) == queue.take(0, 4.0)
    assert names(queue.take(0, 5.0).expired) == ["a"]
    assert len(queue) == 0


def test_a_full_queue_refuses_and_has_room_again_later() -> None:
    queue = Admission(1)
    queue.offer(request("a"), 0.0, deadline_s=5.0)
    with pytest.raises(CapacityError, match="max_queued=1"):
        queue.offer(request("b"), 0.0, deadline_s=5.0)
    assert queue.withdraw("a")
    assert not queue.withdraw("a")
    queue.offer(request("b"), 0.0, deadline_s=5.0)


def test_an_id_waits_once() -> None:
    queue = Admission(4)
    queue.offer(request("a"), 0.0, deadline_s=5.0)
    with pytest.raises(RequestError, match="'a' is in use"):
        queue.offer(request("a", tenant="other"), 0.0, deadline_s=5.0)


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_queued=0"):
        Admission(0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.sampled_from("abc"), st.integers(0, 1), st.integers(1, 9)),
            st.tuples(st.just("take"), st.integers(0, 3)),
            st.tuples(st.just("withdraw"), st.integers(0, 30)),
        ),
        max_size=40,
    )
)
def test_every_request_leaves_once(moments: list[tuple]) -> None:
    queue, left, offered = Admission(6), Counter(), []
    for now_s, (verb, *args) in enumerate(moments):
        if verb == "offer":
            name = f"r{len(offered)}"
            try:
                queue.offer(
                    request(name, tenant=args[0], priority=args[1]), now_s, deadline_s=now_s + args[2]
                )
                offered.append(name)
            except CapacityError:
                assert len(queue) == 6
        elif verb == "take":
            admitted = queue.take(args[0], now_s)
            assert len(admitted.ready) == min(args[0], len(queue) + len(admitted.ready))
            priorities = [ready.priority for ready in admitted.ready]
            assert priorities == sorted(priorities, reverse=True)
            left.update(names(admitted.ready + admitted.expired))
        elif queue.withdraw(f"r{args[0]}"):
            left[f"r{args[0]}"] += 1
        queue.check()
    left.update(names(queue.take(99, -1.0).ready))
    assert left == Counter(offered)
