"""What ranks are doing before they are ready, and how many bytes or sizes of steps of it are done. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from k2dist.messages import RankProgress
from k2dist.observe.pace import Pace


class Work(NamedTuple):
    """What is being done, and how much of it: bytes, or sizes of steps."""

    what: str
    done: int
    total: int
    is_bytes: bool = True


def work_of(ranks: Iterable[RankProgress]) -> Work:
    """Of all ranks together: loading until all have loaded, then testing, and where steps are recorded
    warming up and recording."""
    ranks = tuple(ranks)
    total = sum(rank.num_bytes for rank in ranks)
    loaded = sum(rank.num_bytes_loaded for rank in ranks)
    if loaded < total:
        return Work("loaded", loaded, total)
    tested = sum(rank.num_bytes_tested for rank in ranks)
    sizes, graphs = (sum(rank.num_sizes for rank in ranks), sum(rank.num_graphs for rank in ranks))
    if tested < total or not sizes:
        return Work("tested", tested, total)
    if not graphs:
        return Work("warmed up", sum(rank.num_sizes_warm for rank in ranks), sizes, is_bytes=False)
    return Work("recorded", sum(rank.num_graphs_recorded for rank in ranks), graphs, is_bytes=False)


def work_line(work: Work, pace: Pace) -> str:
    """The rate and the time left once they can be told."""
    if not work.is_bytes:
        return f"{work.what} {work.done} of {work.total} sizes of steps"
    unit, size, digits = ("GB", 1e9, 2) if work.total >= 1e9 else ("MB", 1e6, 1)
    text = f"{work.what} {work.done / size:.{digits}f} of {work.total / size:.{digits}f} {unit}"
    rate, eta_s = pace.per_s, pace.eta_s(work.total)
    return text if rate is None or eta_s is None else f"{text}, {rate / 1e9:.2f} GB/s, {eta_s:.0f} s left"
