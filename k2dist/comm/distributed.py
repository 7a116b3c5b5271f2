"""A group of processes over torch.distributed's gloo, made explicitly: no default group, no environment.

Gloo gives no way to end a call under way: one that is given up on ends at gloo's own timeout.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
from torch.distributed import (  # type: ignore[attr-defined]  # the stubs do not re-export the stores
    ProcessGroupGloo,
    Store,
    Work,
)

from k2dist.comm.processes import SLICE_S, Group, ProcessCommunicator, cause
from k2dist.errors import ConfigError, PeerError
from k2dist.ids import Generation


class DistCommunicator(ProcessCommunicator):
    """A `ProcessCommunicator` for rows on the CPU. `address` is where this process listens.

    Errors of construction besides: ConfigError for an address not ours.
    """

    def __init__(
        self,
        store: Store,
        *,
        generation: Generation,
        name: str,
        members: Sequence[int],
        world_rank: int,
        address: str,
        deadline_s: float,
        join_deadline_s: float,
    ) -> None:
        self._address = address
        super().__init__(
            store,
            generation=generation,
            name=name,
            members=members,
            world_rank=world_rank,
            device=torch.device("cpu"),
            deadline_s=deadline_s,
            join_deadline_s=join_deadline_s,
        )

    def _open(self, store: Store, join_deadline_s: float) -> Group:
        try:  # by address: the default looks the machine's own name up
            device = ProcessGroupGloo.create_device(hostname=self._address)
        except RuntimeError as error:
            raise ConfigError(
                f"{self._address} is no address of this machine; give one that peers can reach"
            ) from error
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [device]
        options._timeout = timedelta(seconds=self._deadline_s)
        try:
            return cast(Group, ProcessGroupGloo(store, self._rank, self._size, options))
        except RuntimeError as error:
            raise PeerError(
                f"no full mesh of {self._size} ranks at {self._address}: {cause(error)}"
            ) from error

    def _is_done(self, work: Work, slice_s: float) -> bool:
        try:
            work.wait(timedelta(seconds=slice_s))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait(timedelta(seconds=slice_s))  # raises what it failed of; or it completed this moment
        return True

    def _outlast(self, group: Group, work: Work | None) -> None:
        """The group's destructor waits for the call, so hold it until gloo ends that."""
        while work is not None and not work.is_completed():
            time.sleep(SLICE_S)
        del group
