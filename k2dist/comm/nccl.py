"""A group of processes over NCCL, for rows on a CUDA device: one process, one device.

The process group is made explicitly, and its own ways to deal with trouble are off (`ENVIRONMENT`): by
default a late peer ends this process. Here a call is awaited like any other transport's; one that is given up
on is aborted, which ends its kernels, so that the device is free for the next generation.

The host waits for each call. So none can be captured in a graph, and none hides behind computation.

Nothing in this file that touches NCCL has run yet: there has been no CUDA device. What has is all that is
shared with gloo, and, with a group that is made up, what is said here of deadlines, fences and aborts.
"""

from __future__ import annotations

import queue
import threading
import time
from datetime import timedelta
from typing import Protocol, cast

import torch
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

    Errors of construction besides: ConfigError where torch was built without NCCL.
    """

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
            work = group.alltoall_base(torch.empty_like(x_R1), x_R1, ones, ones)
            while not self._is_done(work, SLICE_S):
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
        if not work.is_success():
            raise RuntimeError("NCCL reports an error of this call or of a peer's connection")
        work.wait()  # for the current stream's sake: nothing is left to wait for
        return True

    def _outlast(self, group: Group, work: Work | None) -> None:
        """Abort may hang as well (NVIDIA/nccl issue 1013); `work` keeps its rows until then."""
        cast(_NcclGroup, group).abort()
        del group, work
