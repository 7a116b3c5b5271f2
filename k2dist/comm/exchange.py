"""Tokens to their experts and back, with exact uneven splits.

    dispatch   rows, expert ids ──counts──> ──rows──> rows of all ranks for the experts of this one
    combine    one output per (row, expert) ─────────> home, unreduced, in the order of the router

A row goes once to each rank that holds any of its experts; beside it travel its K slots there (-1:
elsewhere). The pairs (row, slot) are rebuilt where they arrive. An idle rank sends no rows and still makes
every call.

Legend: T rows of this rank, K experts of a row, W columns of a wire row, N rows arrived, M pairs arrived,
D columns of an expert's output, R ranks, L MoE layers, E logical experts, e slots of this rank, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from k2dist.comm.communicator import Communicator
from k2dist.comm.rows import from_bytes, to_bytes
from k2dist.ids import SlotId, WorldRank

SLOT_BYTES = 4  # int32
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Work for this rank's experts. Pairs are sorted by slot, then source rank, then source row.

    The counts may sum to fewer than M: what lies behind so many pairs is nobody's (slot -1), and is neither
    computed nor read.
    """

    rows_NW: Tensor  # dtype of the wire; by source rank, then source row
    row_M: Tensor  # int64: index into rows_NW
    slot_M: Tensor  # int64: slot on this rank
    counts_per_slot: Tensor  # int64 [e]: pairs of each slot


@dataclass(frozen=True, slots=True)
class Ticket:
    """What `combine` must know to bring the outputs home. Used once, on the rank that got it."""

    num_rows: int
    top_k: int
    arrived_M: Tensor  # int64: sorted pair -> pair in order of arrival (source rank, source row, k)
    home_TK: Tensor  # int64 [T * K]: which of the outputs that come home is the one of t * K + k
    pairs_from: list[int]  # pairs that came from each rank
    pairs_to: list[int]  # pairs that went to each rank
    stays: bool = False  # a world of one: nothing moved, and `arrived_M` says where each pair is at home


class TokenExchange(Protocol):
    """How rows get to their experts and back: `Exchange` says what is to arrive; others differ in the way."""

    def dispatch(self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor) -> tuple[Dispatched, Ticket]: ...

    def combine(self, out_MD: Tensor, ticket: Ticket) -> Tensor: ...

    def home_slots(self, moe_layer: int) -> Tensor | None:
        """Int32 [E], where every expert is on this rank and nothing needs to be dispatched; else None."""
        ...

    def count_at_home(self, moe_layer: int, counts_e: Tensor) -> None:
        """Note what was computed without a dispatch: pairs of each slot."""
        ...


class Exchange:
    """One rank's side of the token exchange of every MoE layer. `comm` is the group of all world ranks.

    `homes[l][e]` is the copy (rank, slot) of expert e of MoE layer l (0-based) that this rank uses; another
    rank may use another copy. All ranks agree on the row width W, its dtype and K, rows or none. Rows and
    expert ids are on `device`.
    """

    def __init__(
        self,
        comm: Communicator,
        homes: Sequence[Sequence[tuple[WorldRank, SlotId]]],
        device: torch.device = _CPU,
    ) -> None:
        self.comm = comm
        self.device = device
        self.rank_LE = [_table([rank for rank, _ in layer], torch.int64, device) for layer in homes]
        self.slot_LE = [_table([slot for _, slot in layer], torch.int32, device) for layer in homes]
        self.num_slots = [
            max((slot + 1 for rank, slot in layer if rank == comm.rank), default=0) for layer in homes
        ]
        # Since the start. Bytes, to other ranks only: rows with their slots, and outputs sent home.
        self.num_bytes_sent = 0
        self.num_steps_padded = 0
        self.num_overflows = 0  # of these, steps that were repeated
        # int64 on `device`: rows sent to other ranks, then rows of each slot, layer by layer. The step that
        # reads its tokens reads these beside them: whoever asks in between must not make the device wait.
        self.counts = torch.zeros(1 + sum(self.num_slots), dtype=torch.int64, device=device)
        self._num_rows_sent, *self._load_Le = self.counts.split([1, *self.num_slots])
        self._noted = self.counts if device.type == "cpu" else torch.zeros_like(self.counts, device=_CPU)

    def note(self, counts: Tensor) -> None:
        """`counts`, read: what `num_rows_sent` and `expert_load` say from now on. On a CPU they always do."""
        self._noted = counts

    @property
    def num_rows_sent(self) -> int:
        """Since the start, to other ranks; as of the last `note`."""
        return int(self._noted[0])

    def expert_load(self) -> tuple[tuple[int, ...], ...]:
        """[moe layer][slot of this rank]: rows its expert was given since the start, from all ranks; as of
        the last `note`."""
        return tuple(tuple(load_e.tolist()) for load_e in self._noted[1:].split(self.num_slots))

    def dispatch(self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor) -> tuple[Dispatched, Ticket]:
        """Send each row to the ranks of its experts; what this rank's experts must compute comes back.

        `expert_TK`: int64, the experts of a row, all different. Collective.
        """
        num_rows, top_k = expert_TK.shape
        assert len(rows_TW) == num_rows, f"{len(rows_TW)} rows, experts for {num_rows}"
        if self.comm.size == 1:
            return self.stay(moe_layer, rows_TW, expert_TK)
        rank_TK = self.rank_LE[moe_layer][expert_TK]
        to_rank_RT = _destinations(rank_TK, self.comm.size)
        self.comm.settle()  # here and below: the host reads counts
        send = to_rank_RT.sum(1).tolist()
        recv = self._exchange_counts(send)

        packed_NB = self._pack(moe_layer, rows_TW, expert_TK, rank_TK, to_rank_RT)
        arrived_NB = self.comm.all_to_all_rows(packed_NB, send, recv)
        num_away = self._num_away(send)
        self.comm.settle()
        row_bytes = arrived_NB.shape[1] - top_k * SLOT_BYTES
        rows_NW = from_bytes(arrived_NB[:, :row_bytes], rows_TW.dtype)
        slot_NK = from_bytes(arrived_NB[:, row_bytes:], torch.int32)
        work, arrived_M, pairs_from = self._sort_pairs(rows_NW, slot_NK, recv, self.num_slots[moe_layer])
        self.count(moe_layer, work, num_away, num_away * packed_NB.shape[1])
        home_TK = rank_TK.flatten().argsort(stable=True).argsort()
        pairs_to = rank_TK.flatten().bincount(minlength=self.comm.size).tolist()
        return work, Ticket(num_rows, top_k, arrived_M, home_TK, pairs_from, pairs_to)

    def combine(self, out_MD: Tensor, ticket: Ticket) -> Tensor:
        """Outputs of `dispatch`'s pairs, in their order, go home. Result: [T, K, D], same dtype, unreduced.

        Entry (t, k) is the output of row t's expert `expert_TK[t, k]`. Collective.
        """
        out_TKD, num_bytes = self.bring_home(out_MD, ticket)
        self.num_bytes_sent += num_bytes
        return out_TKD

    def bring_home(self, out_MD: Tensor, ticket: Ticket) -> tuple[Tensor, int]:
        """`combine`, and the bytes that it sent to other ranks."""
        assert len(out_MD) == len(ticket.arrived_M), (
            f"{len(out_MD)} outputs for {len(ticket.arrived_M)} pairs"
        )
        if ticket.stays:
            home_ND = torch.empty_like(out_MD).index_copy_(0, ticket.arrived_M, out_MD)
            return home_ND.view(ticket.num_rows, ticket.top_k, out_MD.shape[1]), 0
        out_MB = to_bytes(out_MD)
        arrival_MB = torch.empty_like(out_MB).index_copy_(0, ticket.arrived_M, out_MB)
        came_home_NB = self.comm.all_to_all_rows(arrival_MB, ticket.pairs_from, ticket.pairs_to)
        home_NB = came_home_NB.index_select(0, ticket.home_TK)
        home_ND = from_bytes(home_NB, out_MD.dtype)
        num_bytes = self._num_away(ticket.pairs_from) * out_MB.shape[1]
        return home_ND.view(ticket.num_rows, ticket.top_k, out_MD.shape[1]), num_bytes

    def home_slots(self, moe_layer: int) -> Tensor | None:
        return self.slot_LE[moe_layer] if self.comm.size == 1 else None

    def count_at_home(self, moe_layer: int, counts_e: Tensor) -> None:
        self._load_Le[moe_layer] += counts_e

    def count(self, moe_layer: int, work: Dispatched, num_rows_away: int | Tensor, num_bytes: int) -> None:
        """Note a dispatch: what came for this rank's experts, and what left for other ranks'."""
        self._load_Le[moe_layer] += work.counts_per_slot
        self._num_rows_sent += num_rows_away
        self.num_bytes_sent += num_bytes

    def stay(
        self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor, is_row_T: Tensor | None = None
    ) -> tuple[Dispatched, Ticket]:
        """`dispatch` of a world of one: the same pairs in the same order. Nothing moves or is read back.

        Rows that are none (bool `is_row_T`; None: all are) get no outputs.

        Not the general way with one rank: that is 40 calls of torch a layer, half the time of a decode step
        on a CPU.
        """
        num_rows, top_k = expert_TK.shape
        num_slots = self.num_slots[moe_layer]
        slot_TK = self.slot_LE[moe_layer][expert_TK]
        if is_row_T is not None:
            slot_TK = slot_TK.where(is_row_T[:, None], num_slots)
        slot_M, order_M = slot_TK.flatten().sort(stable=True)
        slot_M, counts_e = counted(slot_M.long(), num_slots)
        self._load_Le[moe_layer] += counts_e
        work = Dispatched(rows_TW, order_M.div(top_k, rounding_mode="floor"), slot_M, counts_e)
        pairs = [num_rows * top_k]
        return work, Ticket(num_rows, top_k, order_M, order_M, pairs, pairs, stays=True)

    def _exchange_counts(self, send: list[int]) -> list[int]:
        """How many rows each rank will send to this one."""
        ones = [1] * self.comm.size
        count_R1 = _table(send, torch.int64, self.device)[:, None]
        count_R1 = self.comm.all_to_all_rows(count_R1, ones, ones)
        self.comm.settle()
        recv: list[int] = count_R1[:, 0].tolist()
        return recv

    def _pack(
        self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor, rank_TK: Tensor, to_rank_RT: Tensor
    ) -> Tensor:
        """Bytes to send, by destination rank, then row: the row, and for each k its slot there or -1."""
        rank_N, row_N = to_rank_RT.nonzero(as_tuple=True)
        slot_NK = self.slot_LE[moe_layer][expert_TK[row_N]]
        slot_NK = slot_NK.masked_fill(rank_TK[row_N] != rank_N[:, None], -1)
        return torch.cat((to_bytes(rows_TW).index_select(0, row_N), to_bytes(slot_NK)), dim=1)

    def _num_away(self, counts: list[int]) -> int:
        return sum(counts) - counts[self.comm.rank]

    def _sort_pairs(
        self, rows_NW: Tensor, slot_NK: Tensor, recv: list[int], num_slots: int
    ) -> tuple[Dispatched, Tensor, list[int]]:
        """Pairs by slot; for each the index in order of arrival; how many came from each rank."""
        row_M, k_M = (slot_NK >= 0).nonzero(as_tuple=True)  # by source rank, source row, k
        slot_M = slot_NK[row_M, k_M].long()
        order_M = slot_M.argsort(stable=True)
        rank_R = torch.arange(self.comm.size, device=self.device)
        source_N = rank_R.repeat_interleave(_table(recv, torch.int64, self.device))
        pairs_from = source_N[row_M].bincount(minlength=self.comm.size).tolist()
        counts_e = slot_M.bincount(minlength=num_slots)
        assert len(counts_e) == num_slots, (
            f"rows came for slot {len(counts_e) - 1} of {num_slots}: homes differ"
        )
        return Dispatched(rows_NW, row_M[order_M], slot_M[order_M], counts_e), order_M, pairs_from


def _destinations(rank_TK: Tensor, size: int) -> Tensor:
    """Bool [R, T]: whether rank r holds any expert of row t."""
    to_rank_RT = torch.zeros(size, len(rank_TK), dtype=torch.bool, device=rank_TK.device)
    to_rank_RT[rank_TK, torch.arange(len(rank_TK), device=rank_TK.device)[:, None].expand_as(rank_TK)] = True
    return to_rank_RT


def counted(slot_M: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Slots with -1 for `num_slots`, nobody's, and the pairs of each: int64 [M] and [e]. Not bincount: that
    asks the device for the largest."""
    counts_e = slot_M.new_zeros(num_slots + 1).scatter_add_(0, slot_M, torch.ones_like(slot_M))
    return slot_M.masked_fill(slot_M == num_slots, -1), counts_e[:num_slots]


def _table(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
