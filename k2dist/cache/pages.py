"""A lane's pages: which are free, and how many tables hold each of the others.

alloc(2) -> (0, 1)     count 1 each
retain((0,))           count of page 0: 2   (two sequences share a prefix)
free((0, 1))           page 1 is free again, page 0 has one holder left
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from k2dist.errors import ConfigError
from k2dist.ids import PageId


class PagePool:
    """`num_pages` pages of `page_tokens` tokens each, by reference count.

    The free list is first in, first out: pages come back in the order in which they were freed, so what a
    freed page holds survives as long as possible (which a prefix cache will want), and equal histories
    give equal pages on every machine. A fresh pool gives 0, 1, 2, ...
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

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_tokens)

    def holders(self, page: PageId) -> int:
        """In how many tables the page is; 0: it is free."""
        return self._holders[page]

    def alloc(self, num_pages: int) -> tuple[PageId, ...]:
        """Pages with one holder each. Asking for more than `num_free` is a bug: look first."""
        assert 0 <= num_pages <= len(self._free), f"{num_pages} pages asked for, {len(self._free)} free"
        pages = tuple(self._free.popleft() for _ in range(num_pages))
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[PageId]) -> None:
        """One more holder for each; none of them may be free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free and cannot be shared"
            self._holders[page] += 1

    def free(self, pages: Iterable[PageId]) -> None:
        """One holder fewer for each; a page without holders joins the end of the free list."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} was freed twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def check(self) -> None:
        """Assert that every page is either free, once, or held."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, holders in enumerate(self._holders):
            assert holders >= 0, f"page {page} has {holders} holders"
            assert (holders == 0) == (page in free), (
                f"page {page} has {holders} holders, free: {page in free}"
            )
