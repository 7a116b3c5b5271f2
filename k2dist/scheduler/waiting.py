"""A lane's waiting sequences: tenants take turns, and within a tenant the order is that of `policy.rank`.

    tenant a: a1 a2 a3 ...     waits since its last turn, or since a1 came if its line was empty
    tenant b: b1               (so a thousand sequences wait behind their own first one, not before b1)
    next: the tenant that has waited longest, where one priority of its first sequence counts as `ageing_s`

Taking the next one costs the same however many wait: O(log) of the tenants that do.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter

from k2dist.scheduler.sequence import Sequence


@dataclass(eq=False, slots=True)
class _Line:
    """One tenant's sequences, the first one last, so that it can be popped."""

    since_s: float  # its last turn, or the arrival that began the line
    turn: int  # number of that; orders lines of equal time
    seqs: list[Sequence] = field(default_factory=list)
    key: tuple[float, int] = (0.0, 0)  # larger goes first; its place in the order of lines


class Waiting:
    """See the module."""

    def __init__(self, ageing_s: float) -> None:
        self.num_tokens = 0  # known tokens of all that wait
        self._ageing_s = ageing_s
        self._num_seqs = 0
        self._lines: dict[str, _Line] = {}  # of tenants that have any
        self._order: list[_Line] = []  # the next one last
        self._turns = count()

    def __len__(self) -> int:
        return self._num_seqs

    def first(self) -> Sequence:
        """Whose turn it is; there must be one."""
        return self._order[-1].seqs[-1]

    def add(self, seq: Sequence, since_s: float) -> None:
        """`since_s`: when it arrived or, of one that comes back, when its tenant had that turn."""
        line = self._lines.get(seq.request.tenant)
        if line is None:
            line = self._lines[seq.request.tenant] = _Line(since_s, next(self._turns))
        else:
            self._withdraw(line)
        insort(line.seqs, seq, key=_last_first)
        self._enter(line)
        self._num_seqs += 1
        self.num_tokens += seq.known_len

    def take_turn(self, now_s: float) -> Sequence:
        """Remove and return the first sequence; its tenant's turn is over."""
        seq = self.first()
        line = self._lines[seq.request.tenant]
        self._withdraw(line)
        line.since_s, line.turn = now_s, next(self._turns)
        self._drop(line, seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that waits here, wherever it stands."""
        line = self._lines[seq.request.tenant]
        self._withdraw(line)
        self._drop(line, seq)

    def _drop(self, line: _Line, seq: Sequence) -> None:
        index = bisect_left(line.seqs, _last_first(seq), key=_last_first)
        assert line.seqs[index] is seq, f"sequence {seq.id} does not wait"
        del line.seqs[index]
        self._num_seqs -= 1
        self.num_tokens -= seq.known_len
        if line.seqs:
            self._enter(line)
        else:
            del self._lines[seq.request.tenant]

    def _enter(self, line: _Line) -> None:
        head_start_s = line.seqs[-1].request.priority * self._ageing_s
        line.key = (head_start_s - line.since_s, -line.turn)
        insort(self._order, line, key=_key)

    def _withdraw(self, line: _Line) -> None:
        del self._order[bisect_left(self._order, line.key, key=_key)]

    def check(self) -> None:
        """Assert that every line has a place in the order, and every sequence one in its tenant's line."""
        assert self._order == sorted(self._lines.values(), key=_key), "a tenant has no turn, or two"
        assert self._num_seqs == sum(len(line.seqs) for line in self._order), "a sequence is lost"
        assert self.num_tokens == sum(seq.known_len for line in self._order for seq in line.seqs)
        for tenant, line in self._lines.items():
            assert line.seqs, f"tenant {tenant!r} has a turn and nothing to run"
            assert line.seqs == sorted(line.seqs, key=_last_first), f"tenant {tenant!r} is out of order"
            assert line.key[0] == line.seqs[-1].request.priority * self._ageing_s - line.since_s, "an old key"
            for seq in line.seqs:
                seq.check_waiting()
                assert seq.request.tenant == tenant, f"sequence {seq.id} is in another tenant's line"

    def ids(self) -> list[int]:
        """Of all that wait, in no order; for checks."""
        return [seq.id for line in self._order for seq in line.seqs]


_key = attrgetter("key")


def _last_first(seq: Sequence) -> tuple[float, int]:
    key_s, number = seq.rank
    return (-key_s, -number)
