"""A step's numbers on their way to the device, beside the step that still computes there.

    step loop      fill n+1 ─┐
    copy stream              └─ host -> device ─┐
    device thread  ... step n ..................└─> copied to where step n+1 reads them

Two buffers take turns: a third step is not planned before the first has been read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Staging:
    """Buffers of `size` int64, of which a step may need fewer. `put` belongs to the step loop, what it
    returns to the device thread."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._turns = [Staged(size, device) for _ in range(2)]

    def put(self, fill_: Callable[[Tensor], None], size: int) -> Staged:
        """Let `fill_` write the first `size` of the next buffer, and send them on their way."""
        staged = self._turns.pop(0)
        self._turns.append(staged)
        fill_(staged.host[:size])
        staged.send(size)
        return staged


class Staged:
    """One buffer on the host, and on a CUDA device its copy."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=self._is_cuda)
        self._there = self.host
        if self._is_cuda:
            self._stream, self._arrived = torch.cuda.Stream(device), torch.cuda.Event()
            with torch.cuda.stream(self._stream):  # it writes there first
                self._there = torch.zeros(size, dtype=torch.int64, device=device)

    def send(self, size: int) -> None:
        if self._is_cuda:
            with torch.cuda.stream(self._stream):
                self._there[:size].copy_(self.host[:size], non_blocking=True)
                self._arrived.record()

    def copy_to_(self, out: Tensor) -> None:
        """As many as `out` has, which were sent; on the current stream, once they have arrived."""
        if self._is_cuda:
            torch.cuda.current_stream().wait_event(self._arrived)
        out.copy_(self._there[: len(out)], non_blocking=True)
