"""A group of processes, whatever carries their rows: deadlines, fences, and who was late.

A transport starts a call and says when it is done; nothing else of it is trusted. So each call is awaited in
slices; between slices the fence and the deadline are looked at, and a call that is given up on is left to a
thread.

Legend: N rows, B bytes of a row.
"""

from __future__ import annotations

import re
import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # the stubs do not re-export the stores
    PrefixStore,
    Store,
    Work,
)

from k2dist.comm.mesh import MeshCommunicator
from k2dist.comm.roll_call import RollCall
from k2dist.errors import FencedError, PeerError
from k2dist.ids import Generation

SLICE_S = 0.1  # a fence is noticed within this
_JOINED = "joined"


class Group(Protocol):
    """The one operation used of a process group, which the stubs leave out."""

    def alltoall_base(self, out_NB: Tensor, x_NB: Tensor, recv: list[int], send: list[int], /) -> Work: ...


class ProcessCommunicator(MeshCommunicator):
    """One process's place in one group of one generation. `fence` ends the group for this process alone:
    its peers see a `PeerError` unless they are fenced too.

    Constructing it is collective: all members must, within `join_deadline_s`. Calls belong to one thread,
    each ends within `deadline_s`. `members` are world ranks in group order, `name` tells groups of one
    generation apart, `device` is where the transport wants rows. Sizes from 1 up.

    Errors of every call: PeerError, with the world ranks that are late or dead; FencedError. Either ends the
    group: later calls raise the same. Of construction: PeerError.
    """

    def __init__(
        self,
        store: Store,
        *,
        generation: Generation,
        name: str,
        members: Sequence[int],
        world_rank: int,
        device: torch.device,
        deadline_s: float,
        join_deadline_s: float,
    ) -> None:
        super().__init__(list(members).index(world_rank), len(members))
        self._name = f"group {name} of generation {generation}"
        # The last part of a deadline goes to asking who is late, so that call and answer fit in it.
        self._ask_s = min(1.0, deadline_s / 4)
        self._wait_s = deadline_s - self._ask_s
        self._deadline_s = deadline_s
        self._device = device
        self._num_calls = 0
        self._fenced = threading.Event()
        self._ended: PeerError | None = None
        here = PrefixStore(f"k2dist/{generation}/{name}", store)
        self._roll_call = RollCall(here, members, self._rank)
        self._await_members(join_deadline_s)
        self._group: Group | None = self._open(here, join_deadline_s)

    def fence(self) -> None:
        self._fenced.set()

    @abstractmethod
    def _open(self, store: Store, join_deadline_s: float) -> Group:
        """The transport's group. All members are there. Errors: PeerError, ConfigError."""

    @abstractmethod
    def _is_done(self, work: Work, slice_s: float) -> bool:
        """Whether a call has completed; waits up to `slice_s` for it. RuntimeError if it failed."""

    @abstractmethod
    def _outlast(self, group: Group, work: Work | None) -> None:
        """Let `group` go, with the call under way, if any. In a thread of its own: it may take for ever."""

    def _swap(self, x_NB: Tensor, send: Sequence[int], recv: Sequence[int], call: str) -> Tensor:
        where = f"{call}, call {self._num_calls} of {self._name}"
        group = self._open_group(where)
        out_NB = torch.empty(sum(recv), x_NB.shape[1], dtype=torch.uint8, device=self._device)
        try:
            work = group.alltoall_base(out_NB, x_NB.to(self._device), list(recv), list(send))
            self._await(work, where)
        except RuntimeError as error:  # all that gloo and NCCL ever raise
            self._broke(where, error)
        self._num_calls += 1
        return out_NB.to(x_NB.device)

    def _open_group(self, where: str) -> Group:
        """For the call `where`. Errors: what ended the group."""
        if self._fenced.is_set():
            self._end(None)
        if self._ended is not None:
            raise self._ended
        group = self._group
        if group is None:
            raise FencedError(f"{where}: fenced: join the next generation")
        return group

    def _broke(self, where: str, error: RuntimeError) -> NoReturn:
        """A call failed: PeerError, with who is late or dead; FencedError if it was this rank's fence."""
        self._end(None)
        if self._fenced.is_set():
            raise FencedError(f"{where}: fenced: join the next generation") from error
        self._ended = self._peer_error(f"{where}: the connection broke ({cause(error)})")
        raise self._ended from error

    def _await(self, work: Work, where: str) -> None:
        """Wait for one call. Errors: FencedError; PeerError: given up on; RuntimeError: it failed."""
        started_s = time.monotonic()
        has_reported = False
        while not self._is_done(work, min(SLICE_S, self._ask_s / 2)):
            waited_s = time.monotonic() - started_s
            if self._fenced.is_set():
                self._roll_call.report(str(self._num_calls))  # or peers would take this rank for a late one
                self._end(work)
                raise FencedError(f"{where}: fenced while waiting: join the next generation")
            if waited_s >= self._wait_s:
                self._end(work)
                self._ended = self._peer_error(f"{where}: not complete within {self._deadline_s:g} s")
                raise self._ended
            if waited_s >= self._ask_s / 2 and not has_reported:
                # Whoever gives up on this call first will ask who was here.
                self._roll_call.report(str(self._num_calls))
                has_reported = True

    def _peer_error(self, message: str) -> PeerError:
        self._roll_call.report(str(self._num_calls))
        late = self._roll_call.absent(str(self._num_calls), self._ask_s)
        names = ", ".join(map(str, late))
        return PeerError(
            f"{message}; " + (f"late or dead: rank {names}" if late else "no rank is known late"), late
        )

    def _await_members(self, join_deadline_s: float) -> None:
        self._roll_call.report(_JOINED)
        absent = self._roll_call.absent(_JOINED, join_deadline_s)
        if absent:
            names = ", ".join(map(str, absent))
            raise PeerError(f"{self._name}: rank {names} did not join within {join_deadline_s:g} s", absent)

    def _end(self, work: Work | None) -> None:
        """Let go of the group, not in the caller's time."""
        if self._group is not None:
            leaving = threading.Thread(target=self._outlast, args=(self._group, work), daemon=True)
            self._group = None
            leaving.start()


def cause(error: RuntimeError) -> str:
    """What the transport said, less source file and advice: "Connection closed by peer [10.0.0.2]:50401"."""
    return re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
