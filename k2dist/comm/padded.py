"""Tokens to their experts and back at a fixed capacity: every shape is known before the rows are.

    dispatch   rows, expert ids ──a frame for each rank──> rows of all ranks for the experts of this one
    combine    one output per (row, expert) ──a frame for each rank──> home, unreduced, in the router's order

What arrives and its bits are those of `Exchange`. But each rank sends each rank as many rows, and gets as
many pairs back, as `Capacity` has room for: nobody tells counts beforehand, nothing waits for the device, and
a step can be captured as a graph. It takes two collectives a layer in place of three, and sends more bytes.

    frame out    [row | slots of its experts there, -1: elsewhere | has this rank overflowed] x capacity.rows
    frame home   [output of the n-th pair of the frame out] x capacity.pairs

Rows that find no room are left out and told of: every frame says whether its sender has overflowed, so after
a step's last dispatch all ranks know alike. Such a step's results mean nothing: it is to be repeated with
the exact exchange.

Legend: T rows of this rank, K experts of a row, W columns of a wire row, R ranks, C rows and P pairs of a
frame, N = R C rows and M = R P pairs arrived, D columns of an output, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2dist.comm.exchange import SLOT_BYTES, Dispatched, Exchange, Ticket, counted
from k2dist.comm.rows import from_bytes, to_bytes
from k2dist.parallel import Capacity


class PaddedExchange:
    """A step's way of exchanging that reads nothing back, on the tables and counters of the rank's `exact`
    exchange. `begin` before each step.

    `capacity`: None in a world of one, where nothing moves and all has room.
    """

    def __init__(self, exact: Exchange, capacity: Capacity | None) -> None:
        assert capacity is not None or exact.comm.size == 1, "rows that travel need a capacity"
        self._exact = exact
        self._capacity = capacity
        self._has_overflowed = torch.zeros((), dtype=torch.bool, device=exact.device)  # this rank's frames
        # Whether any rank has, in any layer dispatched so far: bool, on the device; all ranks say alike.
        self.has_any_overflowed = self._has_overflowed.clone()
        self.num_bytes_sent = 0  # of this step, to other ranks
        self._is_row_T: Tensor | None = None
        self._rank_R11 = torch.arange(exact.comm.size, device=exact.device)[:, None, None]

    @property
    def can_overflow(self) -> bool:
        return self._capacity is not None

    def begin(self, is_row_T: Tensor | None = None) -> None:
        """A step begins. `is_row_T`: bool, of this rank's rows those that are any; None: all."""
        self._has_overflowed.zero_()
        self.has_any_overflowed.zero_()
        self.num_bytes_sent = 0
        self._is_row_T = is_row_T

    def has_overflowed(self) -> bool:
        """Whether any rank has, in any layer dispatched so far. Waits for the device."""
        return bool(self.has_any_overflowed)

    def dispatch(self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor) -> tuple[Dispatched, Ticket]:
        """As `Exchange.dispatch`; rows and pairs for which there is no room are missing, and so is what is no
        row."""
        if self._capacity is None:
            return self._exact.stay(moe_layer, rows_TW, expert_TK, self._is_row_T)
        comm, capacity, top_k = self._exact.comm, self._capacity, expert_TK.shape[1]
        rank_TK = self._exact.rank_LE[moe_layer][expert_TK]
        is_there_RTK = rank_TK == self._rank_R11
        if self._is_row_T is not None and len(rows_TW):
            is_there_RTK = is_there_RTK & self._is_row_T[:, None]
        num_rows_R, packed_NB = self._pack(
            capacity, rows_TW, self._exact.slot_LE[moe_layer][expert_TK], is_there_RTK
        )
        frames = [capacity.rows] * comm.size
        arrived_NB = comm.all_to_all_rows(packed_NB, frames, frames)

        row_bytes = arrived_NB.shape[1] - (top_k + 1) * SLOT_BYTES
        rows_NW = from_bytes(arrived_NB[:, :row_bytes], rows_TW.dtype)
        tag_Nk = from_bytes(arrived_NB[:, row_bytes:], torch.int32)
        self.has_any_overflowed |= tag_Nk[:, top_k].any()
        work, arrived_M = self._sort_pairs(
            capacity.pairs, rows_NW, tag_Nk[:, :top_k], self._exact.num_slots[moe_layer]
        )
        self._exact.count(moe_layer, work, num_rows_R.sum() - num_rows_R[comm.rank], 0)
        self.num_bytes_sent += (comm.size - 1) * capacity.rows * packed_NB.shape[1]
        pairs = [capacity.pairs] * comm.size
        home_TK = self._places_home(capacity.pairs, rank_TK, is_there_RTK)
        return work, Ticket(len(rows_TW), top_k, arrived_M, home_TK, pairs, pairs)

    def combine(self, out_MD: Tensor, ticket: Ticket) -> Tensor:
        """As `Exchange.combine`. Outputs that are nobody's travel too, and are not read."""
        out_TKD, num_bytes = self._exact.bring_home(out_MD, ticket)
        self.num_bytes_sent += num_bytes
        return out_TKD

    def home_slots(self, moe_layer: int) -> Tensor | None:
        """As of `Exchange`, where every row is one: of those that are none, nothing must be computed."""
        return None if self._is_row_T is not None else self._exact.home_slots(moe_layer)

    def count_at_home(self, moe_layer: int, counts_e: Tensor) -> None:
        self._exact.count_at_home(moe_layer, counts_e)

    def _pack(
        self, capacity: Capacity, rows_TW: Tensor, slot_TK: Tensor, is_there_RTK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The frames for all ranks, [R * C, B], and how many rows are for each rank."""
        (size, num_rows, top_k), room = is_there_RTK.shape, capacity.rows
        goes_RT = is_there_RTK.any(2)
        num_rows_R = goes_RT.sum(1)
        num_pairs_R = is_there_RTK.flatten(1).sum(1)
        self._has_overflowed |= (num_rows_R > room).any() | (num_pairs_R > capacity.pairs).any()

        place_RT = _places(goes_RT, room)
        row_T = torch.arange(num_rows, device=rows_TW.device)
        row_RC = _into_places(place_RT, row_T.expand(size, -1), room, fill=0)
        there_RTK = slot_TK.where(is_there_RTK, -1)
        slot_RCK = slot_TK.new_full((size, room + 1, top_k), -1)
        slot_RCK.scatter_(1, place_RT[:, :, None].expand(-1, -1, top_k), there_RTK)
        tag_RCk = torch.cat(
            (slot_RCK[:, :room], self._has_overflowed.to(slot_TK.dtype).expand(size, room, 1)), dim=2
        )
        row_TB = to_bytes(rows_TW)
        if num_rows > 0:  # an empty place holds row 0, and no slot
            row_NB = row_TB.index_select(0, row_RC.flatten())
        else:  # a rank without rows still sends frames
            row_NB = row_TB.new_zeros(size * room, row_TB.shape[1])
        return num_rows_R, torch.cat((row_NB, to_bytes(tag_RCk.flatten(0, 1))), dim=1)

    def _sort_pairs(
        self, room: int, rows_NW: Tensor, slot_NK: Tensor, num_slots: int
    ) -> tuple[Dispatched, Tensor]:
        """Pairs by slot, what is nobody's behind them; for each its place in the frames that go home."""
        num_rows, top_k = slot_NK.shape
        size = self._exact.comm.size
        slot_RI = slot_NK.reshape(size, -1).long()  # I: places of a frame's rows, k by k
        row_NK = torch.arange(num_rows, device=slot_NK.device)[:, None].expand(-1, top_k)
        place_RI = _places(slot_RI >= 0, room)
        arrival_slot_M = _into_places(place_RI, slot_RI, room, fill=num_slots).flatten()
        arrival_row_M = _into_places(place_RI, row_NK.reshape(size, -1), room, fill=0).flatten()
        slot_M, order_M = arrival_slot_M.sort(stable=True)
        slot_M, counts_e = counted(slot_M, num_slots)
        return Dispatched(rows_NW, arrival_row_M[order_M], slot_M, counts_e), order_M

    def _places_home(self, room: int, rank_TK: Tensor, is_there_RTK: Tensor) -> Tensor:
        """Where among all outputs that come home each of T * K is."""
        place_RI = _places(is_there_RTK.flatten(1), room - 1)  # without room: any, it means nothing
        rank_1I = rank_TK.view(1, -1)
        return (rank_1I * room + place_RI.gather(0, rank_1I))[0]


def _places(is_in_RI: Tensor, room: int) -> Tensor:
    """For each that is in, how many are before it in its row of `is_in_RI`; `room` for all others, int64."""
    return (is_in_RI.cumsum(1) - 1).where(is_in_RI, room).clamp_(max=room)


def _into_places(place_RI: Tensor, value_RI: Tensor, room: int, *, fill: int) -> Tensor:
    """[R, room]: each value in its place, `fill` where none is. Those at place `room` are dropped."""
    out_RC = value_RI.new_full((len(place_RI), room + 1), fill)
    return out_RC.scatter_(1, place_RI, value_RI)[:, :room]
