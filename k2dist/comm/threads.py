"""A group of threads in one process: for tests, for `LLM`, and to check that all ranks make the same calls.

Each call is a round: every member leaves a copy of its rows on the board, and takes what is meant for it once
all have. Rounds are numbered per group, so a fast member may be one round ahead while a slow one still reads.

Legend: N rows, B bytes of a row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2dist.comm.mesh import MeshCommunicator, starts
from k2dist.errors import FencedError, PeerError


@dataclass(slots=True)
class _Offer:
    """One member's part in one round."""

    call: str
    x_NB: Tensor
    send: tuple[int, ...]


@dataclass(slots=True)
class _Round:
    offers: dict[int, _Offer] = field(default_factory=dict)  # by rank
    num_taken: int = 0


class _Board:
    """What the members of one group share."""

    def __init__(self, members: tuple[int, ...], deadline_s: float) -> None:
        self.members = members
        self.deadline_s = deadline_s
        self._changed = threading.Condition()
        self._rounds: dict[int, _Round] = {}
        self._is_fenced = False
        self._late: tuple[int, ...] = ()  # world ranks that a member gave up on

    def swap(self, number: int, rank: int, offer: _Offer) -> list[_Offer]:
        """Leave `offer` in round `number`; every member's offer, by rank, once all are there."""
        give_up_s = time.monotonic() + self.deadline_s
        with self._changed:
            self._check_open(number, offer.call)
            here = self._rounds.setdefault(number, _Round())
            here.offers[rank] = offer
            if len(here.offers) == len(self.members):
                self._changed.notify_all()
            while len(here.offers) < len(self.members):
                if not self._changed.wait(max(give_up_s - time.monotonic(), 0)):
                    self._give_up(here)
                self._check_open(number, offer.call)
            here.num_taken += 1
            if here.num_taken == len(self.members):
                del self._rounds[number]
            return [here.offers[r] for r in range(len(self.members))]

    def fence(self) -> None:
        with self._changed:
            self._is_fenced = True
            self._changed.notify_all()

    def _give_up(self, here: _Round) -> None:
        """The deadline has passed: whoever is not here is late, for every member alike."""
        if len(here.offers) < len(self.members):
            self._late = self._late or tuple(m for r, m in enumerate(self.members) if r not in here.offers)
            self._changed.notify_all()

    def _check_open(self, number: int, call: str) -> None:
        if self._is_fenced:
            raise FencedError(f"{call}, call {number}: this group was fenced: join the next generation")
        if self._late:
            names = ", ".join(map(str, self._late))
            raise PeerError(
                f"{call}, call {number}: rank {names} did not arrive within {self.deadline_s:g} s", self._late
            )


class ThreadCommunicator(MeshCommunicator):
    """One thread's place in a group. `fence` on any member ends the group for all."""

    def __init__(self, board: _Board, rank: int) -> None:
        super().__init__(rank, len(board.members))
        self._board = board
        self._num_calls = 0

    def fence(self) -> None:
        self._board.fence()

    def _swap(self, x_NB: Tensor, send: Sequence[int], recv: Sequence[int], call: str) -> Tensor:
        number = self._num_calls
        self._num_calls += 1
        # The copy lets the caller write to its rows while slower members still read.
        offers = self._board.swap(number, self._rank, _Offer(call, x_NB.clone(), tuple(send)))
        calls = [(offer.call, offer.x_NB.shape[1]) for offer in offers]
        assert len(set(calls)) == 1, f"call {number}: ranks differ in call or row bytes: {calls}"
        parts = [offer.x_NB[slice(*starts(offer.send)[self._rank])] for offer in offers]
        arrived = [len(part) for part in parts]
        assert arrived == list(recv), (
            f"{call}, call {number}: {arrived} rows came, {list(recv)} were expected"
        )
        return torch.cat(parts)


def thread_group(members: Sequence[int], deadline_s: float) -> list[ThreadCommunicator]:
    """One communicator per member, in order. `members` are world ranks: errors name them.

    A wait of more than `deadline_s` seconds ends the group for every member: `PeerError`.
    """
    board = _Board(tuple(members), deadline_s)
    return [ThreadCommunicator(board, rank) for rank in range(len(members))]


def thread_world(size: int, deadline_s: float) -> list[ThreadCommunicator]:
    """The group of all ranks 0 .. size - 1."""
    return thread_group(range(size), deadline_s)
