"""What a rehearsal found. Times are of the whole model: parts of which fewer layers ran are scaled up."""

from __future__ import annotations

from k2kernels.bench.ceilings import Ceilings

from k2dist.messages import Message
from k2dist.planner.work import Part
from k2dist.rehearsal.load import Load


class PartTime(Message, frozen=True, kw_only=True):
    """One part of a step, the median of the timed ones. `of_layers` / `layers` is what it was scaled by;
    1 / 1: it ran whole."""

    part: Part
    layers: int
    of_layers: int
    measured_ms: float  # in the layers that ran
    ms: float  # in all
    floor_ms: float | None  # None: not known

    @property
    def floor_share(self) -> float | None:
        """Of the roofline: 1 is as fast as the ceilings allow."""
        return None if self.floor_ms is None or self.ms == 0.0 else self.floor_ms / self.ms


class Exchanged(Message, frozen=True, kw_only=True):
    """Of one MoE layer, means over the layers that ran; bytes of one step of the whole model, to and from
    other ranks, the lane's among them."""

    rows_arrived: float
    pairs: float
    slots: int
    slots_hit: float
    bytes_sent: int
    bytes_received: int


class MemoryLine(Message, frozen=True, kw_only=True):
    """With the layers that ran. `held`: None where it cannot be known."""

    name: str
    planned: int
    held: int | None


class RehearsalReport(Message, frozen=True, kw_only=True):
    """`decode_tokens_per_s`, `prompt_tokens_per_s`: of a cluster of such ranks if links cost nothing and no
    rank waited for another. `aside_ms`: making up peers, in no figure."""

    cluster: str
    model: str
    world_rank: int
    lane: int | None
    tp_rank: int | None
    world_size: int
    num_lanes: int
    tp: int
    device: str
    clock: str
    kernels: str
    num_threads: int
    num_layers: int
    of_layers: int
    load: Load
    num_timed: int
    step_ms: float  # the sum of the parts, whole model
    measured_ms: float  # likewise, in the layers that ran
    measured_ms_min: float  # of a whole step, in the layers that ran
    measured_ms_max: float
    aside_ms: float
    parts: tuple[PartTime, ...]
    exchanged: Exchanged | None  # None: a model without experts
    ceilings: Ceilings
    memory: tuple[MemoryLine, ...]
    whole_rank_bytes: int  # planned, with all layers and the config's pages
    device_bytes: int | None  # of the config
    decode_tokens_per_s: float
    prompt_tokens_per_s: float
