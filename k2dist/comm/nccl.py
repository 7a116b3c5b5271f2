"""A group of processes over NCCL, for rows on a CUDA device: one process, one device.

The process group is made explicitly, and its own ways to deal with trouble are off (`ENVIRONMENT`): by
default a late peer ends this process. Calls are queued on the current stream, so that graphs hold them, and
the host waits in `settle` alone: there the deadline is looked at, of all calls since the last one together. A
group that is given up on or fenced is aborted, which ends its kernels and those behind them, so that the
device is free for the next generation.

Nothing in this file that touches NCCL has run yet: there has been no CUDA device. What has is all that is
shared with gloo, and, with a group that is made up, what is said here of deadlines, fences and aborts.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.distributed import Store, Work, is_nccl_available  # type: ignore[attr-defined]  # not in the stubs

from k2dist.comm.processes import SLICE_S, Group, ProcessCommunicator, cause
from k2dist.errors import ConfigError, PeerError

# To be set before a group is made, by whoever hosts a rank with a CUDA device.
ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # do not tear this process down: deadlines are our own
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # nor because the thread that would is stuck
    "TORCH_NCCL_BLOCKING_WAIT": "0",  # `wait` is for streams; the host looks at its own clock
}
_LOOK_AGAIN_S = 2e-5  # between two looks at a call; most take less than ten of these


class _NcclGroup(Group, Protocol):
    def abort(self) -> None: ...


class NcclCommunicator(ProcessCommunicator):
    """A `ProcessCommunicator` for rows on `device`, where its results are too (of rows that came from there).

    `deadline_s` holds for what is queued between two calls of `settle`: computation included.

    Errors of construction besides: ConfigError where torch was built without NCCL.
    """

    @property
    def is_on_stream(self) -> bool:
        return True

    def settle(self) -> None:
        """Errors as of a call: PeerError, FencedError."""
        where = f"settle, after call {self._num_calls - 1} of {self._name}"
        self._open_group(where)
        self._await(self._queued(), where)
        self._open_group(where)  # an abort ends what is queued, too

    def fence(self) -> None:
        """Nobody may be waiting, so what is queued is aborted here and now."""
        super().fence()
        self._end(None)

    def _swap(self, x_NB: Tensor, send: Sequence[int], recv: Sequence[int], call: str) -> Tensor:
        where = f"{call}, call {self._num_calls} of {self._name}"
        group = self._open_group(where)
        out_NB = torch.empty(sum(recv), x_NB.shape[1], dtype=torch.uint8, device=self._device)
        try:
            work = group.alltoall_base(out_NB, x_NB.to(self._device), list(recv), list(send))
            work.wait()  # the current stream does, not the host
        except RuntimeError as error:
            self._broke(where, error)
        self._num_calls += 1
        return out_NB.to(x_NB.device)

    def _queued(self) -> Work:
        """Done once all that the current stream holds is.

        Not the calls' own word: of a call that failed torch says that it is complete, and its `is_success` is
        not implemented any more. On the stream such a call hangs until it is aborted.
        """
        return cast(Work, _Queue(self._device))

    def _open(self, store: Store, join_deadline_s: float) -> Group:
        """NCCL connects with the first call, and blocks meanwhile: that is made in a thread."""
        group = self._make_group(store)
        outcome: queue.SimpleQueue[RuntimeError | None] = queue.SimpleQueue()
        connecting = threading.Thread(target=self._connect, args=(group, outcome), daemon=True)
        connecting.start()
        try:
            error = outcome.get(timeout=join_deadline_s)
        except queue.Empty:
            threading.Thread(target=self._outlast, args=(group, None), daemon=True).start()
            raise PeerError(f"{self._name}: NCCL did not connect within {join_deadline_s:g} s") from None
        if error is not None:
            raise PeerError(f"{self._name}: NCCL did not connect: {cause(error)}") from error
        return group

    def _make_group(self, store: Store) -> _NcclGroup:
        if not is_nccl_available():
            raise ConfigError("this torch was built without NCCL; install one for CUDA, or set rank_gpus: 0")
        from torch.distributed import ProcessGroupNCCL  # not in every build of torch

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._deadline_s)
        return cast(_NcclGroup, ProcessGroupNCCL(store, self._rank, self._size, options))

    def _connect(self, group: Group, outcome: queue.SimpleQueue[RuntimeError | None]) -> None:
        try:
            ones, x_R1 = [1] * self._size, torch.zeros(self._size, 1, dtype=torch.uint8, device=self._device)
            group.alltoall_base(torch.empty_like(x_R1), x_R1, ones, ones).wait()
            queued = self._queued()
            while not self._is_done(queued, SLICE_S):
                pass
        except RuntimeError as error:
            outcome.put(error)
        else:
            outcome.put(None)

    def _is_done(self, work: Work, slice_s: float) -> bool:
        give_up_s = time.monotonic() + slice_s
        while not work.is_completed():
            if time.monotonic() >= give_up_s:
                return False
            time.sleep(_LOOK_AGAIN_S)
        return True

    def _outlast(self, group: Group, work: Work | None) -> None:
        """Abort may hang as well (NVIDIA/nccl issue 1013); `work` keeps its rows until then."""
        cast(_NcclGroup, group).abort()
        del group, work


class _Queue:
    """What the current stream holds at this moment, awaited like one call."""

    def __init__(self, device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.current_stream(device).record_event()

    def is_completed(self) -> bool:
        return self._done is None or self._done.query()
