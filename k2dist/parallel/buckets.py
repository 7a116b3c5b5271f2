"""Sizes of recorded steps: few, as each is recorded; the planner counts them and the engine rounds up to one.

Rows grow by a third or a half. Pages grow fourfold: attention of a recorded step launches programs for the
longest table that its size allows, and those without keys soon end.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_FEWEST_PAGES, _PAGES_GROWTH = 16, 4


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Rows of a lane, and pages of each row's table."""

    rows: int
    pages: int

    @property
    def num_ints(self) -> int:
        """What a step of this size is told in, 8 bytes each: `engine.static_batch` has the layout."""
        return 1 + self.rows * (5 + self.pages)


def buckets(most_rows: int, most_pages: int) -> tuple[Bucket, ...]:
    """Descending: the first holds whatever another does, and so does the memory that it took."""
    return tuple(
        Bucket(rows, pages)
        for rows in reversed(_row_sizes(most_rows))
        for pages in reversed(_page_sizes(most_pages))
    )


def spare_places(most_rows: int) -> int:
    """Of a cache whose steps are recorded with up to so many rows: one to read, and one to write for each."""
    return 1 + most_rows


def _row_sizes(most_rows: int) -> tuple[int, ...]:
    return (*(size for size in _ROWS if size < most_rows), most_rows)


def _page_sizes(most_pages: int) -> tuple[int, ...]:
    sizes = [_FEWEST_PAGES]
    while sizes[-1] < most_pages:
        sizes.append(sizes[-1] * _PAGES_GROWTH)
    return (*sizes[:-1], min(sizes[-1], most_pages))
