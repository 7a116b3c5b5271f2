"""Communication in the fastest order, in place of the one that keeps a row's bits: for the benchmark alone.

    LibraryReductions   gloo's all-reduce of all rows, of which a rank then takes its own
    PreReduced          experts' outputs weighted and summed on the experts' rank: one row home for each that
                        came, in place of one for each pair of row and expert

Legend: T rows, t of this rank, K experts of a row, N rows arrived, M pairs, D width, B bytes of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from k2kernels import KernelSet, Rule
from torch import Tensor
from torch.distributed import Work

from k2dist.comm import Dispatched, DistCommunicator, Exchange, Ticket
from k2dist.comm.rows import from_bytes, to_bytes
from k2dist.ids import SlotId, WorldRank

_WEIGHT_BYTES = 4  # float32


class _Group(Protocol):
    """The other operation used of a process group; the stubs leave it out."""

    def allreduce(self, x_TD: list[Tensor], /) -> Work: ...


class CountingLane(DistCommunicator):
    """A lane's group that counts what its reductions send, bytes of this rank since the start."""

    num_bytes_reduced = 0

    def reduce_rows(self, x_TD: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.num_bytes_reduced += (len(x_TD) - shares[self.rank]) * x_TD.shape[1] * x_TD.element_size()
        return super().reduce_rows(x_TD, shares, dtype)


class LibraryReductions(CountingLane):
    """Sums in gloo's order. Bytes are those of a ring, which passes 2 (r - 1) / r of all rows on."""

    def reduce_rows(self, x_TD: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        total_TD, first = x_TD.clone(), sum(shares[: self.rank])
        cast(_Group, self._group).allreduce([total_TD]).wait()
        self.num_bytes_reduced += 2 * (self.size - 1) * total_TD.nbytes // self.size
        return total_TD[first : first + shares[self.rank]].to(dtype)


class PreReduced(Exchange):
    """One rank's side. `dispatch`, then `combine`, of rows that `kernels(base)` has routed."""

    def __init__(
        self, comm: DistCommunicator, homes: Sequence[Sequence[tuple[WorldRank, SlotId]]], top_k: int
    ) -> None:
        super().__init__(comm, homes)
        self._weight_tK = torch.empty(0, top_k)  # of the rows on their way
        self._row_N = torch.empty(0, dtype=torch.int64)  # this rank's row of each that went out
        self._rows_to: list[int] = []
        self._rows_from: list[int] = []
        self._k_M = torch.empty(0, dtype=torch.int64)  # which of its row's experts a pair is of
        self._weight_M = torch.empty(0)
        self._row_M = torch.empty(0, dtype=torch.int64)

    def kernels(self, base: KernelSet) -> KernelSet:
        """`base` for this rank: its router's weights go with the rows, and what comes home is only added."""

        def route(logit_tE: Tensor, bias_E: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
            expert_tK, self._weight_tK = base.router_topk(logit_tE, bias_E, rule)
            return expert_tK, self._weight_tK

        def add(out_t1D: Tensor, weight_tK: Tensor, shared_tD: Tensor, out_dtype: torch.dtype) -> Tensor:
            return (out_t1D[:, 0] + shared_tD).to(out_dtype)

        return dataclasses.replace(
            base, router_topk=route, weighted_sum=add, whole_moe=None, whole_layers=None
        )

    def dispatch(self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor) -> tuple[Dispatched, Ticket]:
        to_rank_RT = torch.zeros(self.comm.size, len(rows_TW), dtype=torch.bool)
        to_rank_RT[self.rank_LE[moe_layer][expert_TK], torch.arange(len(rows_TW))[:, None]] = True
        self._row_N = to_rank_RT.nonzero()[:, 1]
        self._rows_to = to_rank_RT.sum(1).tolist()
        weight_tK, self._weight_tK = self._weight_tK[: len(rows_TW)], self._weight_tK[:0]
        wide_TB = torch.cat((to_bytes(rows_TW), to_bytes(weight_tK)), dim=1)
        work, ticket = super().dispatch(moe_layer, wide_TB, expert_TK)
        end = wide_TB.shape[1] - ticket.top_k * _WEIGHT_BYTES
        weight_NK = from_bytes(work.rows_NW[:, end:], torch.float32)
        self._row_M, self._weight_M = work.row_M, weight_NK[work.row_M, self._k_M]
        rows_NW = from_bytes(work.rows_NW[:, :end], rows_TW.dtype)
        return dataclasses.replace(work, rows_NW=rows_NW), ticket

    def combine(self, out_MD: Tensor, ticket: Ticket) -> Tensor:
        """Result: float32 [T, 1, D], weighted and summed; what travelled was rounded to `out_MD`'s dtype."""
        sum_ND = torch.zeros(sum(self._rows_from), out_MD.shape[1])
        sum_ND.index_add_(0, self._row_M, out_MD.float() * self._weight_M[:, None])
        away_ND = sum_ND.to(out_MD.dtype)
        home_ND = self.comm.all_to_all_rows(away_ND, self._rows_from, self._rows_to)
        self.num_bytes_sent += self._num_away(self._rows_from) * away_ND.shape[1] * away_ND.element_size()
        out_TD = torch.zeros(ticket.num_rows, out_MD.shape[1])
        return out_TD.index_add_(0, self._row_N, home_ND.float())[:, None]

    def stay(
        self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor, is_row_T: Tensor | None = None
    ) -> tuple[Dispatched, Ticket]:
        work, ticket = super().stay(moe_layer, rows_TW, expert_TK, is_row_T)
        self._rows_from = [len(rows_TW)]
        self._k_M = ticket.arrived_M % ticket.top_k
        return work, ticket

    def _sort_pairs(
        self, rows_NW: Tensor, slot_NK: Tensor, recv: list[int], num_slots: int
    ) -> tuple[Dispatched, Tensor, list[int]]:
        work, order_M, pairs_from = super()._sort_pairs(rows_NW, slot_NK, recv, num_slots)
        self._rows_from = recv
        self._k_M = (slot_NK >= 0).nonzero()[:, 1][order_M]
        return work, order_M, pairs_from
