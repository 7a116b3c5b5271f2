"""In which form a step runs: a pure rule of what all ranks have agreed on, so that all make the same calls.

prompts, more rows than recorded for     rows as they are, exact exchange
generated rows alone                     frames of a fixed capacity, where the config gives one
of a size that all ranks have recorded   so many rows as that has; those behind the step's are none

All lanes take the size that the busiest one needs. A lane with fewer rows, or none, could be given a smaller
one, and nobody would be done sooner: every MoE layer waits for the busiest lane, a padded row costs no
expert, and weights are read once for any number of rows. It would take a graph for every pair of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from k2dist.comm import Capacity, CapacityRule, StepAgreement
from k2dist.engine.shares import even_shares
from k2dist.parallel.buckets import Bucket, buckets


@dataclass(frozen=True, slots=True)
class Form:
    """The same on all ranks of a step."""

    capacity: Capacity | None = None  # of the exchange's frames; None: exact splits
    bucket: Bucket | None = None  # None: eager, with the rows that there are
    num_parts: int = 1  # micro-batches: one's exchange behind another's attention


@dataclass(frozen=True, slots=True)
class FormRule:
    """`buckets`: of recorded steps, or of those to be recorded; descending. `padding`: of steps without
    prompts.

    `split_tokens`: rows of a step from which it is taken in two parts; None: never.
    """

    tp: int
    padding: CapacityRule | None
    buckets: tuple[Bucket, ...]
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
        """`most_rows`, `most_pages`: of the largest step of generated rows that should be replayed. None is
        where rows travel and no capacity is given."""
        can_record = padding is not None or world_size == 1
        return cls(tp, padding, buckets(most_rows, most_pages) if can_record else (), split_tokens)

    def only(self, recorded: tuple[Bucket, ...]) -> FormRule:
        """The rule once so many sizes are recorded, on all ranks, and no others will be."""
        return replace(self, buckets=recorded)

    def form(self, agreed: StepAgreement) -> Form:
        """Of the step that `agreed` is of."""
        if agreed.has_prompts:
            return self._exact(agreed)
        bucket = self._bucket(agreed)
        if bucket is not None:
            return self.recorded(bucket)
        if self.padding is None:
            return self._exact(agreed)
        return Form(self._capacity(agreed.num_rows))

    def recorded(self, bucket: Bucket) -> Form:
        """Of every step of this size."""
        return Form(self._capacity(bucket.rows), bucket)

    def _exact(self, agreed: StepAgreement) -> Form:
        """In parts where there is enough for two."""
        is_split = self.split_tokens is not None and agreed.num_rows >= self.split_tokens
        return Form(num_parts=2 if is_split else 1)

    def _capacity(self, num_rows: int) -> Capacity | None:
        return None if self.padding is None else self.padding.capacity(max(even_shares(num_rows, self.tp)))

    def _bucket(self, agreed: StepAgreement) -> Bucket | None:
        """The smallest that holds the step; fewer rows before fewer pages."""
        fitting = (b for b in self.buckets if b.rows >= agreed.num_rows and b.pages >= agreed.num_pages)
        return min(fitting, default=None)
