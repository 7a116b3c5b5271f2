"""In which form a step runs: a pure rule of what all ranks have agreed on, so that all make the same calls.

prompts, more rows than recorded for     rows as they are, exact exchange
generated rows alone                     frames of a fixed capacity, where the config gives one
and every rank replays                   so many rows as the bucket has; those behind the step's are none
"""

from __future__ import annotations

from dataclasses import dataclass

from k2dist.comm import Capacity, CapacityRule, StepAgreement
from k2dist.engine.shares import even_shares
from k2dist.parallel.buckets import page_buckets, row_buckets


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of a recorded step: rows of a lane, and pages of each row's table."""

    rows: int
    pages: int


@dataclass(frozen=True, slots=True)
class Form:
    """The same on all ranks of a step."""

    capacity: Capacity | None = None  # of the exchange's frames; None: exact splits
    bucket: Bucket | None = None  # None: eager, with the rows that there are
    num_parts: int = 1  # micro-batches: one's exchange behind another's attention


@dataclass(frozen=True, slots=True)
class FormRule:
    """`buckets`: rows and pages to choose from, ascending. `padding`: of steps without prompts.

    `split_tokens`: rows of a step from which it is taken in two parts; None: never.
    """

    tp: int
    world_size: int
    padding: CapacityRule | None
    row_buckets: tuple[int, ...]
    page_buckets: tuple[int, ...]
    split_tokens: int | None = None

    @classmethod
    def of(
        cls,
        *,
        tp: int,
        world_size: int,
        padding: CapacityRule | None,
        most_rows: int,
        most_pages: int,
        split_tokens: int | None,
    ) -> FormRule:
        """`most_rows`, `most_pages`: of the largest step of generated rows that should be replayed."""
        return cls(tp, world_size, padding, row_buckets(most_rows), page_buckets(most_pages), split_tokens)

    @property
    def can_record(self) -> bool:
        """Whether any step can be: what travels needs a capacity."""
        return self.padding is not None or self.world_size == 1

    def form(self, agreed: StepAgreement) -> Form:
        """Of the step that `agreed` is of."""
        if agreed.has_prompts:
            return self._exact(agreed)
        bucket = self._bucket(agreed) if agreed.can_replay and self.can_record else None
        if bucket is None and self.padding is None:
            return self._exact(agreed)
        num_rows = agreed.num_rows if bucket is None else bucket.rows
        return Form(self._capacity(num_rows), bucket)

    def _exact(self, agreed: StepAgreement) -> Form:
        """In parts where there is enough for two."""
        is_split = self.split_tokens is not None and agreed.num_rows >= self.split_tokens
        return Form(num_parts=2 if is_split else 1)

    def _capacity(self, num_rows: int) -> Capacity | None:
        return None if self.padding is None else self.padding.capacity(max(even_shares(num_rows, self.tp)))

    def _bucket(self, agreed: StepAgreement) -> Bucket | None:
        rows = next((size for size in self.row_buckets if size >= agreed.num_rows), None)
        pages = next((size for size in self.page_buckets if size >= agreed.num_pages), None)
        return None if rows is None or pages is None else Bucket(rows, pages)
