"""A lane's sequences and its pages: who runs, who waits, who holds what.

    waiting ──start──> running ──remove──> (ending, while a step in flight still writes its pages) ──> gone
       ^                  │
       └── preempt_last ──┘

Only running and ending sequences hold pages. Both lists are kept in rank order (`policy.rank`).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter

from k2dist.cache import PagePool
from k2dist.ids import PageId, SeqId
from k2dist.scheduler.policy import rank
from k2dist.scheduler.sequence import Sequence


class Roster:
    """See the module. `running` and `waiting` are for reading."""

    def __init__(self, pool: PagePool, max_running: int) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._max_running = max_running
        self._ending: list[Sequence] = []
        self._released: list[SeqId] = []

    # -- coming and going ------------------------------------------------------------------------------

    def enqueue(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=rank)

    def start_next(self) -> Sequence:
        """Move the first waiting sequence among the running."""
        seq = self.waiting.pop(0)
        insort(self.running, seq, key=rank)
        return seq

    def preempt_last(self) -> None:
        """Send the last running sequence back to wait: its pages are freed, its tokens kept."""
        seq = self.running.pop()
        self._drop_pages(seq)
        self._release(seq)
        self.enqueue(seq)

    def remove(self, seq: Sequence, *, is_in_flight: bool) -> None:
        """Take an ended sequence out. One that a step in flight computes keeps its pages until `settle`."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        if is_in_flight:
            self._ending.append(seq)
        else:
            self._drop_pages(seq)
        self._release(seq)

    def settle(self) -> None:
        """No step is in flight: free the pages of sequences that ended during it."""
        for seq in self._ending:
            self._drop_pages(seq)
        self._ending.clear()

    def forget_ranks(self) -> None:
        """The ranks have lost all pages and all sequences: every one waits again."""
        self.settle()
        self._released.clear()
        while self.running:
            self.preempt_last()
        self._released.clear()

    def take_released(self) -> tuple[SeqId, ...]:
        """Sequences that the ranks know and are to forget; each is given once."""
        released = tuple(self._released)
        self._released.clear()
        return released

    # -- pages -----------------------------------------------------------------------------------------

    def secure(self, seq: Sequence, num_tokens: int) -> int:
        """Give a running `seq` pages for `num_tokens` more positions; returns for how many there were any.

        Who cannot have one position takes the pages of the last sequence, as often as it takes. The last one
        itself only waits: nobody needs its pages yet.
        """
        while num_tokens > 0 and self._reach(seq) == 0 and self.running[-1] is not seq:
            self.preempt_last()
        num_tokens = min(num_tokens, self._reach(seq))
        num_pages = self.pool.pages_for(seq.computed_len + num_tokens) - len(seq.pages)
        seq.pages += self.pool.alloc(num_pages)
        return num_tokens

    def fits_next(self) -> bool:
        """Whether the first waiting sequence finds a place, and pages for all it knows and one token more.

        Pages that running sequences still need for as much are spoken for, so that prompts admitted together
        do not preempt each other before they decode. With nobody running it always fits: `add` made sure.
        Who was preempted a moment ago never does: it wants the pages it had, and somebody has one of them.
        """
        if not self.waiting or len(self.running) == self._max_running:
            return False
        needed = sum(self._missing_pages(seq) for seq in self.running)
        return needed + self._missing_pages(self.waiting[0]) <= self.pool.num_free

    def _reach(self, seq: Sequence) -> int:
        """Positions that `seq` could compute with its own pages and all free ones."""
        return (len(seq.pages) + self.pool.num_free) * self.pool.page_tokens - seq.computed_len

    def _missing_pages(self, seq: Sequence) -> int:
        return max(self.pool.pages_for(seq.known_len + 1) - len(seq.pages), 0)

    def _drop_pages(self, seq: Sequence) -> None:
        self.pool.free(seq.pages)
        seq.pages.clear()
        seq.num_pages_told = 0
        seq.computed_len = 0

    def _release(self, seq: Sequence) -> None:
        if seq.is_known:
            seq.is_known = False
            self._released.append(seq.id)

    # -- invariants ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls of the scheduler."""
        self._check_pages()
        for seq in self.running:
            assert seq.end is None, f"sequence {seq.id} runs after its end"
            assert seq.computed_len < seq.known_len, f"sequence {seq.id} computed a token nobody knows"
            assert seq.computed_len <= len(seq.pages) * self.pool.page_tokens, (
                f"sequence {seq.id} lacks a page"
            )
            assert seq.num_pages_told <= len(seq.pages), f"sequence {seq.id} told of pages it has not"
        for seq in self.waiting:
            assert seq.end is None, f"sequence {seq.id} waits after its end"
            assert not seq.pages, f"sequence {seq.id} waits and holds pages"
            assert seq.computed_len == 0, f"sequence {seq.id} waits and has computed"
            assert not seq.is_known, f"sequence {seq.id} waits and the ranks know it"
        assert len(self.running) <= self._max_running, f"{len(self.running)} run"
        for seqs in (self.running, self.waiting):
            assert seqs == sorted(seqs, key=rank), "a list is out of order"

    def check_settled(self) -> None:
        assert not self._ending, "an ended sequence holds pages and no step is in flight"

    def _check_pages(self) -> None:
        """Each page that is held is in exactly one table, once."""
        self.pool.check()
        held = Counter(page for seq in self.running + self._ending for page in seq.pages)
        for page in map(PageId, range(self.pool.num_pages)):
            assert self.pool.holders(page) == held[page], f"page {page}: {held[page]} tables hold it"
            assert held[page] <= 1, f"page {page} is in {held[page]} tables"
