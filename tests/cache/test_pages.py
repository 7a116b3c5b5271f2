"""Every page is free, idle or held, comes home once its last holder lets go, and is found by its key."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.cache import PageKey, PagePool
from k2dist.errors import ConfigError
from k2dist.ids import PageId


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


A, B, C = (PageKey(letter * 32) for letter in (b"a", b"b", b"c"))


def test_a_published_page_is_found_and_kept_for_as_long_as_there_are_others() -> None:
    pool = PagePool(3, 16)
    pages = pool.alloc(2)
    pool.publish(pages[0], A)
    assert pool.find([A]) == [0]
    pool.free(reversed(pages))
    assert (pool.num_free, pool.num_idle) == (3, 1)
    assert pool.alloc(2) == (2, 1), "the ones that hold nothing"
    assert pool.find([A]) == [0]
    pool.retain([0])
    assert (pool.num_free, pool.num_idle, pool.holders(0)) == (0, 0, 1)
    pool.check()


def test_the_least_recently_held_page_is_evicted_first() -> None:
    pool = PagePool(3, 16)
    for page, key in zip(pool.alloc(3), (A, B, C), strict=True):
        pool.publish(page, key)
    pool.free([0, 1, 2])
    pool.retain([0])
    pool.free([0])
    assert pool.alloc(1) == (1,)
    assert (pool.find([A]), pool.find([B]), pool.find([C])) == ([0], [], [2])
    assert pool.alloc(2) == (2, 0)
    assert pool.find([A]) == []
    pool.check()


def test_a_prefix_ends_at_its_first_missing_page_and_no_key_is_asked_for_after_it() -> None:
    pool = PagePool(3, 16)
    for page, key in zip(pool.alloc(2), (A, C), strict=True):
        pool.publish(page, key)
    keys = iter((A, B, C))
    assert pool.find(keys) == [0]
    assert next(keys) == C


def test_the_first_page_of_a_key_stays_its_page() -> None:
    pool = PagePool(2, 16)
    pool.alloc(2)
    pool.publish(PageId(0), A)
    pool.publish(PageId(1), A)
    assert (pool.key_of(PageId(0)), pool.key_of(PageId(1))) == (A, None)
    pool.free([1])
    assert pool.num_idle == 0, "nobody would find it"
    pool.check()


def test_what_is_lost_is_not_found() -> None:
    pool = PagePool(2, 16)
    for page, key in zip(pool.alloc(2), (A, B), strict=True):
        pool.publish(page, key)
    pool.free([1])
    pool.forget_prefixes()
    assert pool.find([A]) == []
    assert (pool.num_free, pool.num_idle, pool.holders(PageId(0))) == (1, 0, 1)
    pool.check()


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_the_last_page_may_be_filled_in_part(num_tokens: int, num_pages: int) -> None:
    assert PagePool(4, 16).pages_for(num_tokens) == num_pages


@pytest.mark.parametrize(
    "misuse", ["too many", "freed twice", "published while free", "published twice", "shared while free"]
)
def test_misuse_is_caught(misuse: str) -> None:
    pool = PagePool(2, 16)
    (other,) = pool.alloc(1)
    pool.publish(other, A)
    pages = pool.alloc(1)
    pool.free(pages)
    wrong = {
        "too many": lambda: pool.alloc(3),
        "freed twice": lambda: pool.free(pages),
        "published while free": lambda: pool.publish(pages[0], B),
        "published twice": lambda: pool.publish(other, B),
        "shared while free": lambda: pool.retain(pages),
    }
    with pytest.raises(AssertionError, match=r"^\d pages asked for|^page \d (was|is)"):
        wrong[misuse]()


@pytest.mark.parametrize(
    ("num_pages", "page_tokens", "field"),
    [(0, 16, "num_pages"), (4, 48, "page_tokens"), (4, 0, "page_tokens")],
)
def test_a_pool_that_cannot_be_is_refused(num_pages: int, page_tokens: int, field: str) -> None:
    with pytest.raises(ConfigError, match=f"cache.{field}="):
        PagePool(num_pages, page_tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from(["alloc", "retain", "free", "publish", "find"]), st.integers(0, 7))),
)
def test_every_page_comes_home(num_pages: int, actions: list[tuple[str, int]]) -> None:
    """Against a twin that knows what was published when, and never evicts more than it must."""
    pool, held, published = PagePool(num_pages, 4), [], {}
    for action, number in actions:
        key = PageKey(bytes([number] * 32))
        if action == "alloc" and number <= pool.num_free:
            num_unused = pool.num_free - pool.num_idle
            pages = pool.alloc(number)
            assert not set(pages) & set(held), "a held page was given out"
            evicted = {key for key, page in published.items() if page in pages}
            assert len(evicted) == max(number - num_unused, 0), "evicted more, or less, than it must"
            published = {key: page for key, page in published.items() if key not in evicted}
            held += pages
        elif action == "retain" and held:
            pool.retain([held[number % len(held)]])
            held.append(held[number % len(held)])
        elif action == "find" and key in published:
            assert pool.find([key]) == [published[key]]
            pool.retain([published[key]])
            held.append(published[key])
        elif action == "free" and held:
            pool.free([held.pop(number % len(held))])
        elif action == "publish" and held and held[0] not in published.values():
            pool.publish(held[0], key)
            published.setdefault(key, held[0])
        pool.check()
        assert all(pool.holders(page) == held.count(page) for page in range(num_pages))
        assert pool.num_idle == len(set(published.values()) - set(held))
    pool.free(held)
    assert pool.num_free == num_pages
