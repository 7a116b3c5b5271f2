"""Request ids lead every coordinator to the same one."""

from __future__ import annotations

import uuid

import pytest

from k2dist.coordinator import home_of, new_request_id


@pytest.mark.parametrize("num", [1, 2, 3, 16])
def test_a_drawn_id_names_who_drew_it(num: int) -> None:
    for home in range(num):
        assert home_of(new_request_id(home, str(uuid.UUID(int=home))), num) == home


def test_a_chosen_id_has_one_home_and_homes_are_even() -> None:
    homes = [home_of(str(uuid.UUID(int=n)), 4) for n in range(4000)]
    assert homes == [home_of(str(uuid.UUID(int=n)), 4) for n in range(4000)]
    assert all(900 < homes.count(home) < 1100 for home in range(4))


@pytest.mark.parametrize("request_id", ["c9-x", "c99999-x", "c-1", "", "chatcmpl-0", "\ud800"])
def test_an_id_that_names_nobody_has_a_home_all_the_same(request_id: str) -> None:
    assert home_of(request_id, 2) in (0, 1)
