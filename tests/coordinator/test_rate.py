"""Token buckets: nobody gets more than the limit in the long run, and nobody is shut out for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2dist.coordinator import Account, RateLimit


def test_a_minutes_worth_at_once_and_then_one_at_a_time() -> None:
    account = Account(RateLimit(requests_per_minute=3), 100.0)
    assert [account.admit(100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert account.admit(100.0) == pytest.approx(20.0)
    assert account.admit(110.0) == pytest.approx(10.0)  # asking costs nothing
    assert account.admit(120.0) == 0.0
    assert account.admit(120.0) == pytest.approx(20.0)


def test_tokens_are_paid_afterwards_and_a_debt_is_waited_for() -> None:
    account = Account(RateLimit(tokens_per_minute=60), 0.0)
    assert account.admit(0.0) == 0.0
    account.pay_tokens(100, 0.0)  # more than a minute's worth, and let in all the same
    assert account.admit(0.0) == pytest.approx(41.0)
    assert account.admit(40.5) == pytest.approx(0.5)
    assert account.admit(41.0) == 0.0


def test_without_a_limit_nothing_is_counted() -> None:
    account = Account(RateLimit(), 0.0)
    account.pay_tokens(10**9, 0.0)
    assert all(account.admit(0.0) == 0.0 for _ in range(1000))


def test_a_request_that_is_refused_for_its_tokens_is_not_counted() -> None:
    account = Account(RateLimit(requests_per_minute=1, tokens_per_minute=60), 0.0)
    account.pay_tokens(60, 0.0)
    assert account.admit(0.0) > 0.0
    assert account.admit(1.0) == 0.0  # the one request of this minute is still there


def test_a_changed_limit_keeps_what_was_used() -> None:
    account = Account(RateLimit(requests_per_minute=2), 0.0)
    assert (account.admit(0.0), account.admit(0.0)) == (0.0, 0.0)
    account.change(RateLimit(requests_per_minute=3), 0.0)
    assert account.admit(0.0) == 0.0
    assert account.admit(0.0) > 0.0
    account.change(RateLimit(requests_per_minute=1), 0.0)
    assert account.admit(30.0) > 0.0  # in debt by the two it had more than it may have now
    account.change(RateLimit(), 30.0)
    assert account.admit(30.0) == 0.0


@given(
    limit=st.integers(1, 1000),
    moves=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 500)), max_size=60),
)
def test_no_more_than_the_limit_and_one_request_over_it(limit: int, moves: list[tuple[float, int]]) -> None:
    account, now_s, used, largest = Account(RateLimit(tokens_per_minute=limit), 0.0), 0.0, 0, 0
    for passed_s, cost in moves:
        now_s += passed_s
        wait_s = account.admit(now_s)
        account.check()
        if wait_s == 0.0:
            account.pay_tokens(cost, now_s)
            used, largest = used + cost, max(largest, cost)
        else:
            assert account.admit(now_s + wait_s * 1.000001 + 1e-6) == 0.0, "what it said would do does"
            now_s += wait_s * 1.000001 + 1e-6
        assert used <= limit * (1 + now_s / 60) + largest + 1
