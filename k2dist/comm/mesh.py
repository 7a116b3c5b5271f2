"""Every collective, made of one: an all-to-all of byte rows.

Transports differ in `_swap` alone, so they cannot differ in a bit. Full-mesh on purpose: each rank waits for
each other rank in every call, so a death is seen by all at once (gloo's all-reduce shows it to some only),
and no library chooses an order of summation.

Legend: N rows, T rows of the whole group, t rows of this rank's share, D columns, B bytes of a row.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from k2dist.comm.rows import check_counts, from_bytes, sum_in_order, to_bytes
from k2dist.observe import Waits

# A broadcast's first frame: 8 bytes of length, then data. A step's plan nearly always fits: one exchange.
_FRAME_BYTES = 4096
_LENGTH_BYTES = 8


class MeshCommunicator(ABC):
    """A `Communicator` whose subclass moves bytes. `rank` and `size` are of this group."""

    def __init__(self, rank: int, size: int) -> None:
        assert 0 <= rank < size, f"rank {rank} of {size}"
        self._rank = rank
        self._size = size
        self.waits = Waits()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def is_on_stream(self) -> bool:
        return False

    def settle(self) -> None:
        assert not self.is_on_stream, "a transport whose calls are queued waits for them"

    def all_to_all_rows(self, x_ND: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        return self._all_to_all(x_ND, send, recv, "all_to_all_rows")

    def reduce_rows(self, x_TD: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert x_TD.dtype == torch.float32, f"sums run in float32, not {x_TD.dtype}"
        share = shares[self._rank]
        addend_ND = self._all_to_all(x_TD, shares, [share] * self._size, "reduce_rows")
        # Not split(share): a share of no rows would give one addend too few, or too many.
        return sum_in_order([addend_ND[r * share : (r + 1) * share] for r in range(self._size)], dtype)

    def gather_rows(self, x_tD: Tensor, shares: Sequence[int]) -> Tensor:
        assert len(shares) == self._size, f"{len(shares)} shares for {self._size} ranks"
        share = shares[self._rank]
        assert len(x_tD) == share, f"{len(x_tD)} rows given, {share} are this rank's share"
        copies_NB = to_bytes(x_tD).repeat(self._size, 1)
        return from_bytes(
            self._all_to_all(copies_NB, [share] * self._size, shares, "gather_rows"), x_tD.dtype
        )

    def exchange_ints(self, row: Sequence[int]) -> list[list[int]]:
        ones = [1] * self._size
        row_NL = torch.tensor([list(row)], dtype=torch.int64).repeat(self._size, 1)
        row_RL = self._all_to_all(row_NL, ones, ones, "exchange_ints")
        self.settle()
        rows: list[list[int]] = row_RL.tolist()
        return rows

    def broadcast_bytes(self, data: bytes | None, source: int) -> bytes:
        assert 0 <= source < self._size, f"source {source} in a group of {self._size}"
        if self._rank == source:
            assert data is not None, "the source of a broadcast gives its data"
            length = len(data).to_bytes(_LENGTH_BYTES, "little")
            frame = (length + data)[:_FRAME_BYTES].ljust(_FRAME_BYTES, b"\0")
        else:
            frame = b""
        frame = self._broadcast(frame, source, _FRAME_BYTES)
        num_bytes = int.from_bytes(frame[:_LENGTH_BYTES], "little")
        first = frame[_LENGTH_BYTES : _LENGTH_BYTES + num_bytes]
        if len(first) == num_bytes:
            return first
        rest = data[len(first) :] if data is not None and self._rank == source else b""
        return first + self._broadcast(rest, source, num_bytes - len(first))

    @abstractmethod
    def fence(self) -> None: ...

    @abstractmethod
    def _swap(self, x_NB: Tensor, send: Sequence[int], recv: Sequence[int], call: str) -> Tensor:
        """`all_to_all_rows` of uint8 rows; the result is a new tensor. `call` is for messages.

        Errors: PeerError, FencedError, each within the group's deadline.
        """

    def _all_to_all(self, x_ND: Tensor, send: Sequence[int], recv: Sequence[int], call: str) -> Tensor:
        check_counts(x_ND, send, recv, self._size)
        self.waits.begin(call, time.monotonic())
        arrived_NB = self._swap(to_bytes(x_ND), send, recv, call)
        self.waits.end(time.monotonic())
        return from_bytes(arrived_NB, x_ND.dtype)

    def _broadcast(self, data: bytes, source: int, num_bytes: int) -> bytes:
        """`num_bytes` from `source` to all, as rows of one byte."""
        sends = self._rank == source
        x_N1 = torch.frombuffer(bytearray(data * self._size), dtype=torch.uint8) if sends else _NO_BYTES
        send = [num_bytes if sends else 0] * self._size
        recv = [num_bytes if r == source else 0 for r in range(self._size)]
        arrived_N1 = self._all_to_all(x_N1.view(-1, 1), send, recv, "broadcast_bytes")
        self.settle()
        return arrived_N1.numpy().tobytes()


_NO_BYTES = torch.empty(0, dtype=torch.uint8)


def starts(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The interval [start, end) of each of `counts` consecutive runs of rows."""
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return list(pairwise(bounds))
