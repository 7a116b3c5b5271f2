"""One rank's memory, and what all ranks of a model at one tp have in common.

    device_bytes = weights + angles + activations + exchange + graphs + spare + reserve + pages x page_bytes

Weights, pages and spare pages are exact, activations (the workspace of a step) and exchange are estimates
from above (`buffers`), graphs are estimated and in part assumed, the reserve is the config's.
"""

from __future__ import annotations

from collections.abc import Sequence

from k2dist.config.architecture import Architecture
from k2dist.ids import LaneId, WorldRank
from k2dist.messages import Message
from k2dist.planner.buffers import activation_bytes, exchange_bytes, recorded_bytes, spare_pages
from k2dist.planner.held import Kind, LaneBytes, expert_bytes, lane_bytes
from k2dist.planner.terms import Terms

ANGLE_BYTES = 4  # float32: a cosine and a sine per rotary pair and position


class RankMemory(Message, frozen=True, kw_only=True):
    """`weights`: bytes held, by kind. `page_bytes` is 0 on a rank without a lane."""

    world_rank: WorldRank
    lane: LaneId | None
    read_bytes: int  # of the checkpoint's files
    weights: dict[Kind, int]
    angles: int  # of every position that the model allows
    activations: int
    exchange: int
    graphs: int = 0
    spare: int = 0  # pages of the cache that no sequence gets
    reserve: int
    page_bytes: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def fixed_bytes(self) -> int:
        """All but pages."""
        step_bytes = self.activations + self.exchange + self.graphs + self.spare
        return self.weight_bytes + self.angles + step_bytes + self.reserve

    def parts(self) -> dict[str, int]:
        """What `fixed_bytes` is the sum of, by name, without what is 0."""
        named = {str(kind): num_bytes for kind, num_bytes in self.weights.items()}
        named |= {"angles": self.angles, "activations": self.activations}
        named |= {"exchange": self.exchange, "graphs": self.graphs, "spare pages": self.spare}
        named["reserve"] = self.reserve
        return {name: num_bytes for name, num_bytes in named.items() if num_bytes}

    def free_bytes(self, device_bytes: int) -> int:
        """For pages; below 0 if the rest alone does not fit."""
        return device_bytes - self.fixed_bytes


class RankCosts:
    """One model at one tp: worked out once, then cheap for any number of ranks."""

    def __init__(self, architecture: Architecture, tp: int, terms: Terms) -> None:
        a = architecture
        self.architecture = a
        self.tp = tp
        self.terms = terms
        self._lane: LaneBytes = lane_bytes(a, tp, terms.form)
        self._expert_read = expert_bytes(a)
        self._expert_held = expert_bytes(a, terms.form)
        self._page_bytes = terms.page_tokens * a.latent_dim * a.num_layers * terms.form.stream_bytes

    def rank(
        self, world_rank: WorldRank, lane: LaneId | None, *, lanes: int, slots: Sequence[int], all_slots: int
    ) -> RankMemory:
        """`slots` of this rank, by MoE layer; `all_slots` of all ranks in one layer."""
        a, terms = self.architecture, self.terms
        has_lane = lane is not None
        num_slots = sum(slots)
        weights = dict(self._lane.held) if has_lane else dict.fromkeys(Kind, 0)
        weights[Kind.EXPERTS] = num_slots * self._expert_held if terms.are_experts_here else 0
        most_slots = max(slots) if slots else None
        exchange = 0
        if most_slots is not None:
            own_rows = -(-terms.step_tokens // self.tp) if has_lane else 0
            exchange = exchange_bytes(
                a, terms, own_rows=own_rows, lanes=lanes, slots=most_slots, all_slots=all_slots
            )
        lane_read = sum(self._lane.read.values()) if has_lane else 0
        return RankMemory(
            world_rank=world_rank,
            lane=lane,
            read_bytes=num_slots * self._expert_read + lane_read,
            weights=weights,
            angles=a.max_positions * a.qk_rope_head_dim * ANGLE_BYTES if has_lane else 0,
            activations=activation_bytes(a, terms, tp=self.tp) if has_lane else 0,
            exchange=exchange,
            graphs=recorded_bytes(
                a,
                terms,
                tp=self.tp,
                lanes=lanes,
                slots=most_slots,
                all_slots=all_slots,
                has_lane=has_lane,
            ),
            spare=spare_pages(terms) * self._page_bytes if has_lane else 0,
            reserve=terms.reserve_bytes,
            page_bytes=self._page_bytes if has_lane else 0,
        )

    def evenly(self, world_size: int, lanes: int, *, slots: int | None = None) -> tuple[RankMemory, ...]:
        """The fullest ranks of each sort when all experts are spread evenly over `world_size` ranks, each
        once, or in `slots` of every rank."""
        a = self.architecture
        of_rank = -(-a.num_experts // world_size) if slots is None else slots
        all_slots = a.num_experts if slots is None else slots * world_size
        sorts = [LaneId(0)] if world_size == lanes * self.tp else [LaneId(0), None]
        return tuple(
            self.rank(
                WorldRank(0), lane, lanes=lanes, slots=(of_rank,) * a.num_moe_layers, all_slots=all_slots
            )
            for lane in sorts
        )


def pages_that_fit(ranks: Sequence[RankMemory], device_bytes: int) -> int | None:
    """Of every lane, with all its ranks among `ranks`; None if the rest of some rank does not fit."""
    free = [rank.free_bytes(device_bytes) for rank in ranks]
    if min(free) < 0:
        return None
    return min(left // rank.page_bytes for left, rank in zip(free, ranks, strict=True) if rank.page_bytes)
