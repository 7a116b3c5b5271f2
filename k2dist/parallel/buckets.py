"""Sizes of recorded steps: few, as each is recorded; the planner counts them and the engine rounds up to one.

Rows grow by a third or a half. Pages grow fourfold: attention of a recorded step launches programs for the
longest table that its size allows, and those without keys soon end.
"""

from __future__ import annotations

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_FEWEST_PAGES, _PAGES_GROWTH = 16, 4


def row_buckets(most_rows: int) -> tuple[int, ...]:
    """Rows of a lane, ascending; the last is `most_rows`."""
    return (*(size for size in _ROWS if size < most_rows), most_rows)


def page_buckets(most_pages: int) -> tuple[int, ...]:
    """Pages of each row's table, ascending; the last is `most_pages`."""
    sizes = [_FEWEST_PAGES]
    while sizes[-1] < most_pages:
        sizes.append(sizes[-1] * _PAGES_GROWTH)
    return (*sizes[:-1], min(sizes[-1], most_pages))
