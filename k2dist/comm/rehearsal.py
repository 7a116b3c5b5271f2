"""A group of which one member is real: it acts out its part, and what the others would send is made up.

Made up is only what arrives. Shapes, dtypes, counts and bytes are those of a real group; values are plausible
and the same in every run:

    all collectives but one      rows from a peer are those that go to this rank itself, over and over
    dispatch of the exchange     rows from a peer are drawn beforehand (`PeerRows`): which slots of this rank
                                 each one is for decides how much its experts compute

Nothing waits, and nothing is on a wire: a rehearsal times a rank's own work, never its links.

Legend: N rows, D columns, B bytes of a row, K experts of a row, S sample rows, W columns of a wire row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from k2dist.comm.mesh import MeshCommunicator, starts
from k2dist.comm.rows import check_counts, from_bytes, to_bytes


@dataclass(frozen=True, slots=True)
class PeerRows:
    """What all peers send to this rank's experts in one MoE layer."""

    counts: tuple[int, ...]  # rows of each rank, in rank order; 0 in this rank's own place
    slot_NK: Tensor  # int32, by rank, then row: the slots of this rank that a row is for; -1: another rank's


class RehearsalCommunicator(MeshCommunicator):
    """The place of `rank` in a group of `size`. With size 1 it is `Alone`, bit for bit.

    `aside` is entered while peers are made up, since a clock must not count that.
    """

    def __init__(
        self, rank: int, size: int, aside: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        super().__init__(rank, size)
        self._aside = aside
        # To and from other ranks, since the start.
        self.num_bytes_sent = 0
        self.num_bytes_received = 0

    @property
    def is_on_stream(self) -> bool:
        return True

    def settle(self) -> None:
        """Whoever reads waits for this rank's own work, and there is no other."""

    def fence(self) -> None:
        """There is nobody to let go of, and nothing that waits."""

    def _swap(self, x_NB: Tensor, send: Sequence[int], recv: Sequence[int], call: str) -> Tensor:
        with self._aside():
            self._count(send, recv, x_NB.shape[1])
            (first, last), (begin, end) = starts(send)[self._rank], starts(recv)[self._rank]
            assert last - first == end - begin, f"{call}: {last - first} rows for oneself, {end - begin} come"
            own_NB = x_NB[first:last]
            return torch.cat((_repeated(own_NB, begin), own_NB, _repeated(own_NB, sum(recv) - end)), dim=0)

    def _count(self, send: Sequence[int], recv: Sequence[int], row_bytes: int) -> None:
        self.num_bytes_sent += (sum(send) - send[self._rank]) * row_bytes
        self.num_bytes_received += (sum(recv) - recv[self._rank]) * row_bytes


class RehearsalWorld(RehearsalCommunicator):
    """The group of all world ranks, over which an `Exchange` runs and nothing else.

    `peers[m]`: of MoE layer m; layers come in order, again and again. `sample_SW`: packed rows (at least
    one), as `Exchange.dispatch` takes them, of which peers' rows are copies.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        peers: Sequence[PeerRows],
        sample_SW: Tensor,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(rank, size, aside)
        self._peers = tuple(peers)
        self._sample_SB = to_bytes(sample_SW)
        self.num_rows_sent = 0  # to other ranks, since the start; outputs on their way home not counted
        self._num_dispatches = 0
        self._are_coming_home = False

    def all_to_all_rows(self, x_ND: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """In the exchange's order: int64 counts, then rows out, then their outputs home."""
        check_counts(x_ND, send, recv, self._size)
        if x_ND.dtype == torch.int64:
            return self._counts(x_ND, send, recv)
        self._are_coming_home = not self._are_coming_home
        if not self._are_coming_home:
            return super().all_to_all_rows(x_ND, send, recv)
        with self._aside():
            arrived_NB = self._arrived(to_bytes(x_ND), send, recv)
            self._num_dispatches += 1
            return from_bytes(arrived_NB, x_ND.dtype)

    def _now(self) -> PeerRows:
        return self._peers[self._num_dispatches % len(self._peers)]

    def _counts(self, count_R1: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        with self._aside():
            self._count(send, recv, count_R1.element_size())
            counts = list(self._now().counts)
            counts[self._rank] = int(count_R1[self._rank, 0])
            return torch.tensor(counts, dtype=torch.int64, device=count_R1.device)[:, None]

    def _arrived(self, x_NB: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """This rank's own rows in their place, and peers' round them: a sample row, and beside it its slots.

        More places than a peer has rows stay as -1: nobody's.
        """
        self._count(send, recv, x_NB.shape[1])
        self.num_rows_sent += sum(send) - send[self._rank]
        peers, row_bytes = self._now(), self._sample_SB.shape[1]
        arrived_NB = torch.empty(sum(recv), x_NB.shape[1], dtype=torch.uint8, device=x_NB.device)
        arrived_NB[:, row_bytes:] = 255  # -1 in every slot
        arrived_NB[:, :row_bytes] = _repeated(self._sample_SB, len(arrived_NB))
        slot_NB = to_bytes(peers.slot_NK)
        places, rows = starts(recv), starts(peers.counts)
        for (begin, end), (first, last) in zip(places, rows, strict=True):
            assert last - first <= end - begin, f"room for {end - begin} rows, {last - first} come"
            arrived_NB[begin : begin + last - first, row_bytes:] = slot_NB[first:last]
        begin, end = places[self._rank]
        arrived_NB[begin:end] = x_NB[slice(*starts(send)[self._rank])]
        return arrived_NB


def _repeated(x_NB: Tensor, num_rows: int) -> Tensor:
    """`num_rows` rows: those of `x_NB` over and over; zeros where there is none."""
    if len(x_NB) == 0:
        return x_NB.new_zeros(num_rows, x_NB.shape[1])
    return x_NB[torch.arange(num_rows, device=x_NB.device) % len(x_NB)]
