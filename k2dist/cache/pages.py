"""A lane's pages: how many tables hold each, and which prefix each one holds.

    alloc ──> held ──free, by the last holder──> free, or idle if it was published
                ^                                  │
                └────── retain, by a prefix hit ───┘   alloc evicts idle pages once no free one is left

alloc(2) -> (0, 1)     one holder each
publish(0, key)        page 0 is full, and `key` says of what
retain((0,))           two holders: two sequences share a prefix
free((1, 0))           page 1 is free; page 0 has one holder left
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from k2dist.cache.prefix import PageKey
from k2dist.errors import ConfigError
from k2dist.ids import PageId


class PagePool:
    """`num_pages` pages of `page_tokens` tokens each, by reference count.

    Free pages are used first in, first out, then idle ones, the least recently held first: equal histories
    give equal pages on every machine. A fresh pool gives 0, 1, 2, ... Who frees a table gives its last page
    first: a page is of use only as long as all before it are.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1:
            raise ConfigError(f"cache.num_pages={num_pages}: a lane needs at least 1 page")
        if page_tokens < 1 or page_tokens & (page_tokens - 1):
            raise ConfigError(f"cache.page_tokens={page_tokens}: use a power of two, such as 64")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._holders = [0] * num_pages
        self._free = deque(PageId(page) for page in range(num_pages))
        self._idle: OrderedDict[PageId, None] = OrderedDict()  # published, no holders; oldest first
        self._key_of: dict[PageId, PageKey] = {}
        self._page_of: dict[PageKey, PageId] = {}

    @property
    def num_free(self) -> int:
        """Pages that `alloc` could give, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages without a holder that still hold a prefix."""
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_tokens)

    def holders(self, page: PageId) -> int:
        """In how many tables the page is; 0: it is free or idle."""
        return self._holders[page]

    def key_of(self, page: PageId) -> PageKey | None:
        """What the page was published as."""
        return self._key_of.get(page)

    def alloc(self, num_pages: int) -> tuple[PageId, ...]:
        """Pages with one holder each. Asking for more than `num_free` is a bug: look first."""
        assert 0 <= num_pages <= self.num_free, f"{num_pages} pages asked for, {self.num_free} free"
        pages = tuple(self._free.popleft() if self._free else self._evict() for _ in range(num_pages))
        for page in pages:
            self._holders[page] = 1
        return pages

    def publish(self, page: PageId, key: PageKey) -> None:
        """The held `page` is full of what `key` says, for good. The first page of a key stays its page."""
        assert self._holders[page] > 0, f"page {page} is free and holds nothing"
        assert self._key_of.get(page, key) == key, f"page {page} is published as something else"
        if self._page_of.setdefault(key, page) == page:
            self._key_of[page] = key

    def find(self, keys: Iterable[PageKey]) -> list[PageId]:
        """Pages of the longest run of `keys` that are published, from the first; takes no key after it."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def retain(self, pages: Iterable[PageId]) -> None:
        """One more holder for each; they must be held or idle."""
        for page in pages:
            if self._holders[page] == 0:
                assert page in self._idle, f"page {page} is free and cannot be shared"
                del self._idle[page]
            self._holders[page] += 1

    def free(self, pages: Iterable[PageId]) -> None:
        """One holder fewer for each; a page without holders is the last to be used again."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} was freed twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget_prefixes(self) -> None:
        """What the pages held is gone: nothing is published, idle pages are free."""
        self._key_of.clear()
        self._page_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def _evict(self) -> PageId:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def check(self) -> None:
        """Assert that every page is free, idle or held, and that keys and pages agree."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, holders in enumerate(self._holders):
            is_idle, is_free = page in self._idle, page in free
            assert holders >= 0, f"page {page} has {holders} holders"
            assert (holders == 0) == (is_free != is_idle), (
                f"page {page} has {holders} holders, free: {is_free}, idle: {is_idle}"
            )
            assert not (is_free and page in self._key_of), f"page {page} is free and published"
            assert not is_idle or page in self._key_of, f"page {page} is idle and holds nothing"
        assert {key: page for page, key in self._key_of.items()} == self._page_of, "a key has two pages"
