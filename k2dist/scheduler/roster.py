"""A lane's sequences and its pages: who runs, who waits, who holds what.

    waiting ──start──> catching up ──> decoding ──> finishing ──remove──> gone
       ^                    │              │
       └────── preempt_last ┴──────────────┘

Only running sequences (catching up, decoding, finishing) hold pages. The first two lists are kept in order of
rank, so that a plan looks at no more sequences than it grants rows to. Who is finishing was promised its last
token: it is granted nothing more, and nobody takes its pages.

Whoever leaves gives its pages back at once, though a step in flight may still write them: who gets them next
writes in a later step, and steps run in order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from operator import attrgetter

from k2dist.cache import PageKey, PagePool
from k2dist.ids import PageId, SeqId
from k2dist.messages import PageTable
from k2dist.scheduler.limits import Limits
from k2dist.scheduler.sequence import Sequence
from k2dist.scheduler.waiting import Waiting

by_rank = attrgetter("rank")


class Roster:
    """See the module. `decoding`, `catching_up` and `waiting` are for reading."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self.pool = pool
        self.decoding: list[Sequence] = []
        self.catching_up: list[Sequence] = []
        self.finishing: list[Sequence] = []
        self.waiting = Waiting(limits.ageing_s)
        self._max_running = limits.max_running
        self._reuse_generated = limits.reuse_generated
        self._released: list[SeqId] = []
        self._page_tables: list[PageTable] = []
        # Pages that running sequences lack for all they know and one token more.
        self._num_owed = 0
        # Since the start: see `messages.LaneLoad`.
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.catching_up) + len(self.finishing)

    # -- coming and going ------------------------------------------------------------------------------

    def next_fit(self) -> list[PageId] | None:
        """Pages that the first waiting sequence would find in the cache, or None if it must wait on.

        It needs a place, and pages for all it knows and one token more. Pages that running sequences still
        lack for as much are spoken for, so that prompts admitted together do not preempt each other before
        they decode. With nobody running it always fits: `add` made sure.
        """
        if not self.waiting or self.num_running == self._max_running or self._num_owed >= self.pool.num_free:
            return None
        seq = self.waiting.first()
        hits = self._find_prefix(seq)
        num_revived = sum(self.pool.holders(page) == 0 for page in hits)
        num_new = self.pool.pages_for(seq.known_len + 1) - len(hits)
        return hits if self._num_owed + num_new + num_revived <= self.pool.num_free else None

    def start_next(self, hits: list[PageId], now_s: float) -> Sequence:
        """Let the first waiting sequence run, from behind the pages that `next_fit` found."""
        seq = self.waiting.take_turn(now_s)
        seq.started_s = now_s
        seq.computed_len = len(hits) * self.pool.page_tokens
        if seq.cached_len is None:
            seq.cached_len = min(seq.computed_len, seq.prompt_len)
            seq.queued_s = now_s - seq.added_s
            self.num_prompt_tokens += seq.prompt_len
            self.num_cached_tokens += seq.cached_len
        self.pool.retain(hits)
        self._num_owed += self.pool.pages_for(seq.known_len + 1)
        self._extend(seq, tuple(hits))
        seq.is_decoding = _decodes(seq)
        self._list(seq)
        return seq

    def preempt_last(self) -> None:
        """Send the last sequence that is not finishing back to wait: its pages are freed, its tokens kept."""
        self._preempt(self._last())

    def remove(self, seq: Sequence) -> None:
        """Take an ended sequence out."""
        if seq.pages:
            self._leave(seq)
        else:
            self.waiting.remove(seq)

    def forget_ranks(self) -> None:
        """The ranks have lost all pages and all sequences: every one waits again, and nothing is cached."""
        for seq in (*self.finishing, *self.decoding, *self.catching_up):
            self._preempt(seq)
        self.pool.forget_prefixes()
        self._released.clear()
        self._page_tables.clear()

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
        while self._reach(seq) == 0 and self._last() is not seq:
            self.preempt_last()
        num_tokens = min(num_tokens, self._reach(seq))
        num_pages = self.pool.pages_for(seq.computed_len + num_tokens) - len(seq.pages)
        if num_pages > 0:
            self._extend(seq, self.pool.alloc(num_pages))
        return num_tokens

    def take_page_tables(self) -> tuple[PageTable, ...]:
        """What the ranks do not know yet of the tables of running sequences; each is given once."""
        tables = tuple(self._page_tables)
        self._page_tables.clear()
        return tables

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """`num_tokens` positions were granted, for which `seq` has pages; if they are all, a token more is
        promised. Sees who decodes and who finishes by it."""
        seq.computed_len += num_tokens
        if seq.computed_len == seq.known_len:
            seq.known_len += 1
            self.turned(_wants_page(seq, self.pool.page_tokens))
        if seq.known_len == seq.max_len:
            self.finish(seq)
        elif not seq.is_decoding and _decodes(seq):
            self._unlist(seq)
            seq.is_decoding = True
            self._list(seq)

    def finish(self, seq: Sequence) -> None:
        """The last token of a running sequence is promised."""
        self._unlist(seq)
        seq.is_decoding = True
        self.finishing.append(seq)

    def turned(self, num_seqs: int) -> None:
        """The newest token of `num_seqs` running sequences was the last one that fits into its page."""
        self._num_owed += num_seqs

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """A committed step computed [start, end) of a running `seq`: share the pages that it filled.

        Not of one that was ended during the step: it may have been because the step went wrong.
        """
        last = min(end, self._shareable_len(seq)) // self.pool.page_tokens
        first = start // self.pool.page_tokens
        if first < last:
            keys = list(seq.keys(last, self.pool.page_tokens))
            for index in range(first, last):
                self.pool.publish(seq.pages[index], keys[index])

    def _find_prefix(self, seq: Sequence) -> list[PageId]:
        """Published pages of `seq`'s first tokens; its last known token is always left to be computed."""
        if seq.wants_scores:
            return []
        page_tokens = self.pool.page_tokens
        num_pages = min(seq.known_len - 1, self._shareable_len(seq)) // page_tokens
        return self.pool.find(seq.keys(num_pages, page_tokens))

    def _shareable_len(self, seq: Sequence) -> int:
        """Positions whose pages others may use: a prompt token must have been computed by the prompt path."""
        return seq.taken_len if self._reuse_generated else seq.prompt_len

    def _reach(self, seq: Sequence) -> int:
        """Positions that `seq` could compute with its own pages and all free ones."""
        return seq.held_len + self.pool.num_free * self.pool.page_tokens - seq.computed_len

    def _extend(self, seq: Sequence, pages: tuple[PageId, ...]) -> None:
        if pages:
            self._page_tables.append(PageTable(seq_id=seq.id, first=len(seq.pages), pages=pages))
            seq.pages += pages
            seq.held_len += len(pages) * self.pool.page_tokens
            self._num_owed -= len(pages)

    # -- lists -----------------------------------------------------------------------------------------

    def _list(self, seq: Sequence) -> None:
        insort(self.decoding if seq.is_decoding else self.catching_up, seq, key=by_rank)

    def _unlist(self, seq: Sequence) -> None:
        seqs = self.decoding if seq.is_decoding else self.catching_up
        index = bisect_left(seqs, seq.rank, key=by_rank)
        assert seqs[index] is seq, f"sequence {seq.id} is not listed"
        del seqs[index]

    def _last(self) -> Sequence:
        """Of all that run and are not finishing; there must be one."""
        return max((seqs[-1] for seqs in (self.decoding, self.catching_up) if seqs), key=by_rank)

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(seq, seq.started_s)

    def _leave(self, seq: Sequence) -> None:
        """Out of the running ones, without its pages and what it was promised; the ranks are to forget it."""
        if seq.known_len == seq.max_len:
            self.finishing.remove(seq)
        else:
            self._unlist(seq)
        self._num_owed -= self._num_missing(seq)
        self._released.append(seq.id)
        self.pool.free(reversed(seq.pages))
        seq.pages.clear()
        seq.held_len = seq.computed_len = 0
        seq.known_len = seq.taken_len
        seq.is_decoding = False

    def _num_missing(self, seq: Sequence) -> int:
        return self.pool.pages_for(min(seq.known_len + 1, seq.max_len)) - len(seq.pages)

    # -- invariants ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls of the scheduler."""
        self.pool.check()
        self.waiting.check()
        running = self.decoding + self.catching_up + self.finishing
        for seq in running:
            seq.check_running(self.pool.page_tokens)
        for seqs in (self.decoding, self.catching_up):
            assert seqs == sorted(seqs, key=by_rank), "a list is out of order"
        assert all(seq.is_decoding for seq in self.decoding), "one that catches up is among the decoding"
        assert not any(seq.is_decoding for seq in self.catching_up), "one that decodes is among the others"
        for seq in running:
            assert (seq.known_len == seq.max_len) == (seq in self.finishing), f"sequence {seq.id} goes on"
        assert len(running) <= self._max_running, f"{len(running)} run"
        assert self._num_owed == sum(map(self._num_missing, running)), "pages are owed and not counted"
        self._check_tables(running)

    def _check_tables(self, holders: list[Sequence]) -> None:
        """Every page is in as many tables as the pool says, and holds the same tokens for all of them."""
        held = Counter(page for seq in holders for page in seq.pages)
        for page in map(PageId, range(self.pool.num_pages)):
            assert self.pool.holders(page) == held[page], f"page {page}: {held[page]} tables hold it"
        means: dict[PageId, PageKey] = {}
        for seq in holders:
            num_full = min(seq.computed_len, self._shareable_len(seq)) // self.pool.page_tokens
            keys = list(seq.keys(num_full, self.pool.page_tokens))
            for page, key in zip(seq.pages, keys, strict=False):
                assert self.pool.key_of(page) in (None, key), f"sequence {seq.id} has a wrong page {page}"
                assert means.setdefault(page, key) == key, f"page {page} means two things"
            for page in seq.pages[num_full:]:
                assert self.pool.key_of(page) is None, f"page {page} is published before it is full"
                assert held[page] == 1, f"page {page} is shared before it is full"


def _decodes(seq: Sequence) -> bool:
    return seq.computed_len >= seq.prompt_len and seq.lag == 1


def _wants_page(seq: Sequence, page_tokens: int) -> bool:
    """Whether the newest token fills its page, and another will follow it."""
    return seq.known_len % page_tokens == 0 and seq.known_len < seq.max_len
