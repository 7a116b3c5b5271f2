"""The group of one: what each collective means, and the twin that other transports are tested against."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from k2dist.comm.rows import check_counts
from k2dist.errors import FencedError


class Alone:
    """A `Communicator` with no peers. It never waits."""

    rank = 0
    size = 1
    is_on_stream = True

    def __init__(self) -> None:
        self._fenced = threading.Event()

    def settle(self) -> None:
        self._check_fence()

    def all_to_all_rows(self, x_ND: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        self._check_fence()
        check_counts(x_ND, send, recv, self.size)
        assert send[0] == recv[0], f"{send[0]} rows for this rank, {recv[0]} expected from it"
        return x_ND.clone()

    def reduce_rows(self, x_TD: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._check_fence()
        check_counts(x_TD, shares, shares, self.size)
        assert x_TD.dtype == torch.float32, f"sums run in float32, not {x_TD.dtype}"
        return x_TD.to(dtype, copy=True)

    def gather_rows(self, x_tD: Tensor, shares: Sequence[int]) -> Tensor:
        self._check_fence()
        check_counts(x_tD, shares, shares, self.size)
        return x_tD.clone()

    def exchange_ints(self, row: Sequence[int]) -> list[list[int]]:
        self._check_fence()
        return [list(row)]

    def broadcast_bytes(self, data: bytes | None, source: int) -> bytes:
        self._check_fence()
        assert source == 0, f"source {source} in a group of one"
        assert data is not None, "the source of a broadcast gives its data"
        return data

    def fence(self) -> None:
        self._fenced.set()

    def _check_fence(self) -> None:
        if self._fenced.is_set():
            raise FencedError("this rank's group was fenced: join the next generation")
