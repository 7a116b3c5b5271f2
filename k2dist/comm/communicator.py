"""One rank's place in one group: the contract that every transport keeps, and `Alone`, which defines it.

Legend: N rows, T rows of the whole group, t rows of this rank's share, D columns.

Every call is collective: all members make the same calls in the same order, with rows or without.
Every wait is bounded by the group's deadline; a peer that does not arrive raises `PeerError` naming it,
a group that was fenced raises `FencedError`. Results never alias the argument unless said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Communicator(Protocol):
    """See the module. `rank` is the place in this group, not in the world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def is_on_stream(self) -> bool:
        """Calls are queued on the device's stream like kernels: they return before their rows are there, and
        a graph may hold them. `settle` is where they are waited for."""
        ...

    def settle(self) -> None:
        """Wait until all earlier calls are complete: before the host reads what may depend on one.

        Not collective. Where calls are not on the stream they were awaited already.
        """
        ...

    def all_to_all_rows(self, x_ND: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """Rows of `x_ND`, ordered by destination, go out; rows ordered by source come back.

        send[r], recv[r]: rows for and from rank r; either may be 0. N = sum(send). Result: [sum(recv), D],
        same dtype. Any dtype: transports that lack one move its bytes.
        """
        ...

    def reduce_rows(self, x_TD: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The sum of every rank's float32 `x_TD`, of which this rank keeps its contiguous share of rows.

        shares[r]: rows of rank r, in rank order; T = sum(shares). Result: [shares[rank], D]. The sum runs in
        rank order, ((x0 + x1) + x2) + ..., in float32, and is rounded once, to `dtype`: a row's bits
        depend on nothing but its addends.
        """
        ...

    def gather_rows(self, x_tD: Tensor, shares: Sequence[int]) -> Tensor:
        """Every rank's share, in rank order: [sum(shares), D]. t = shares[rank]."""
        ...

    def exchange_ints(self, row: Sequence[int]) -> list[list[int]]:
        """Every rank's `row` (int64 values, same length on all ranks), indexed by rank."""
        ...

    def broadcast_bytes(self, data: bytes | None, source: int) -> bytes:
        """`data` of rank `source` (the only one whose argument is read), on every rank."""
        ...

    def fence(self) -> None:
        """End this group from any thread: calls under way and later ones raise `FencedError` within a bound.

        Not collective. Between processes it ends this rank's membership, and peers that wait for it get a
        `PeerError` unless they are fenced too. A fenced group is never used again.
        """
        ...
