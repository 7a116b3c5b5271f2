"""Requests that run out of time: all of them, in order, and nobody else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.ids import RequestId
from k2dist.scheduler.deadlines import Deadlines


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["start", "discard", "due"]), st.integers(0, 9), st.integers(0, 9)))
)
def test_whoever_is_due_is_found(actions: list[tuple[str, int, int]]) -> None:
    deadlines, twin = Deadlines(), {}
    for action, number, time_s in actions:
        request_id = RequestId(str(number))
        if action == "start" and request_id not in twin:
            deadlines.start(request_id, time_s)
            twin[request_id] = time_s
        elif action == "discard":
            deadlines.discard(request_id)
            twin.pop(request_id, None)
        else:
            due = sorted((deadline_s, name) for name, deadline_s in twin.items() if deadline_s <= time_s)
            assert deadlines.due(time_s) == [name for _, name in due]
        deadlines.check(set(twin))
        assert len(deadlines) == len(twin)


def test_a_request_has_one_deadline() -> None:
    deadlines = Deadlines()
    deadlines.start(RequestId("a"), 1.0)
    with pytest.raises(AssertionError, match="a has a deadline"):
        deadlines.start(RequestId("a"), 2.0)
