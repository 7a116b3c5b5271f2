"""Work that stops at its calls to the experts: whoever drives it decides how each call is made.

    piece ── call ── piece ── call ── piece        a piece computes on this rank's device, and reads nothing
                                                   back; a call goes out to the experts of all ranks

Straight through (`in_line`), a piece at a time as a graph with the calls between them (`engine.graphs`), or
two pieces of work in turn, one's calls behind the other's pieces (`side_by_side`): the same code, the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

from torch import Tensor

Call: TypeAlias = Callable[[], Tensor]
Waiting: TypeAlias = Callable[[], Tensor]  # returns when it is there
Pieces: TypeAlias = Generator[Call, Tensor, Tensor]


def in_line(pieces: Pieces) -> Tensor:
    """What the work gives, each call made where it stands."""
    try:
        call = next(pieces)
        while True:
            call = pieces.send(call())
    except StopIteration as end:
        result: Tensor = end.value
        return result


def side_by_side(works: Sequence[Pieces], begin: Callable[[Call], Waiting]) -> list[Tensor]:
    """What each of the works gives. `begin` starts a call aside, and what it returns waits for it.

    Calls begin in one order on every rank: one of each work in turn, round and round.
    """
    results: dict[int, Tensor] = {}
    waiting: dict[int, Waiting] = {}
    for number, work in enumerate(works):
        _go_on(number, work, None, waiting, results, begin)
    while waiting:
        for number in list(waiting):
            _go_on(number, works[number], waiting.pop(number), waiting, results, begin)
    return [results[number] for number in range(len(works))]


def _go_on(
    number: int,
    work: Pieces,
    wait: Waiting | None,
    waiting: dict[int, Waiting],
    results: dict[int, Tensor],
    begin: Callable[[Call], Waiting],
) -> None:
    """From the end of its last call to the next one, or to its result."""
    try:
        call = next(work) if wait is None else work.send(wait())
    except StopIteration as end:
        results[number] = end.value
    else:
        waiting[number] = begin(call)
