"""Who comes first. One total order decides admission, page shortage and preemption alike.

    higher priority first, then who arrived first

Because the order is total and does not change while a sequence lives, the first sequence is never preempted
and always advances; so every sequence ends, in that order at the latest.
"""

from __future__ import annotations

from k2dist.scheduler.sequence import Sequence

Rank = tuple[int, int]


def rank(seq: Sequence) -> Rank:
    """Sort key: smaller comes first. Unique per sequence."""
    return (-seq.request.priority, seq.arrival)
