"""Every page is free or held, and comes home once its last holder lets go."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.cache import PagePool
from k2dist.errors import ConfigError


def test_a_fresh_pool_gives_its_pages_in_order() -> None:
    assert PagePool(4, 16).alloc(3) == (0, 1, 2)


def test_the_page_freed_first_is_used_first() -> None:
    pool = PagePool(4, 16)
    pool.alloc(4)
    pool.free([2])
    pool.free([0, 3])
    assert pool.alloc(3) == (2, 0, 3)


def test_a_shared_page_comes_home_with_its_last_holder() -> None:
    pool = PagePool(2, 16)
    pages = pool.alloc(1)
    pool.retain(pages)
    pool.free(pages)
    assert (pool.holders(pages[0]), pool.num_free) == (1, 1)
    pool.free(pages)
    assert (pool.holders(pages[0]), pool.num_free) == (0, 2)
    pool.check()


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_the_last_page_may_be_filled_in_part(num_tokens: int, num_pages: int) -> None:
    assert PagePool(4, 16).pages_for(num_tokens) == num_pages


@pytest.mark.parametrize("misuse", ["too many", "freed twice", "shared while free"])
def test_misuse_is_caught(misuse: str) -> None:
    pool = PagePool(2, 16)
    pages = pool.alloc(1)
    pool.free(pages)
    with pytest.raises(AssertionError):
        {"too many": lambda: pool.alloc(3), "freed twice": lambda: pool.free(pages)}.get(
            misuse, lambda: pool.retain(pages)
        )()


@pytest.mark.parametrize(
    ("num_pages", "page_tokens", "field"),
    [(0, 16, "num_pages"), (4, 48, "page_tokens"), (4, 0, "page_tokens")],
)
def test_a_pool_that_cannot_be_is_refused(num_pages: int, page_tokens: int, field: str) -> None:
    with pytest.raises(ConfigError, match=f"cache.{field}="):
        PagePool(num_pages, page_tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 8), st.lists(st.tuples(st.sampled_from(["alloc", "retain", "free"]), st.integers(0, 7)))
)
def test_every_page_comes_home(num_pages: int, actions: list[tuple[str, int]]) -> None:
    pool, held = PagePool(num_pages, 4), []
    for action, number in actions:
        if action == "alloc" and number <= pool.num_free:
            pages = pool.alloc(number)
            assert not set(pages) & set(held), "a held page was given out"
            held += pages
        elif action == "retain" and held:
            pool.retain([held[number % len(held)]])
            held.append(held[number % len(held)])
        elif action == "free" and held:
            pool.free([held.pop(number % len(held))])
        pool.check()
        assert all(pool.holders(page) == held.count(page) for page in range(num_pages))
    pool.free(held)
    assert pool.num_free == num_pages
