"""Who comes first: one total order of a lane's sequences, fixed for life.

    rank = (when it arrived - priority * ageing_s, number of its arrival)        smaller comes first

A priority is a head start of `ageing_s`, so ageing needs no clock: of two that both wait, both age alike, and
whoever has waited `ageing_s` longer is ahead of one priority more.

The order decides which of its tenant's sequences starts next, who gets pages, and who loses them: always the
last one that runs (`roster`). Between tenants the turn decides who starts (`waiting`). So nothing is stuck:
the first one that runs is never preempted and advances in every step that may compute prompts, until it ends
or one before it starts; and only finitely many can come before it, as whoever comes later starts later.
"""

from __future__ import annotations

Rank = tuple[float, int]


def rank(arrival_s: float, priority: int, number: int, ageing_s: float) -> Rank:
    """Sort key: smaller comes first. Unique, as `number` is."""
    return (arrival_s - priority * ageing_s, number)
