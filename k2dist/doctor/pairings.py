"""Every pair of nodes once, in rounds in which no node is asked twice."""

from __future__ import annotations

from collections.abc import Sequence


def rounds(nodes: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """The circle method: n - 1 rounds of n / 2 pairs; n rounds if n is odd, with one node resting in each."""
    seats: list[str | None] = [*nodes] if len(nodes) % 2 == 0 else [*nodes, None]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append(tuple((a, b) for a, b in facing if a is not None and b is not None))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return tuple(found)
