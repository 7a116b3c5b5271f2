"""How long one rank spends in each kind of collective of one group, and which one it is in now. Pure.

Whoever arrives last waits least, so the totals of all ranks together tell whom the others wait for.
"""

from __future__ import annotations

from k2dist.messages import CollectiveStats, GroupStats


class Waits:
    """Of one rank in one group. `begin` and `end` belong to the thread that calls; `facts` to any."""

    def __init__(self) -> None:
        self._num_begun = 0
        self._by_call: dict[str, tuple[int, float]] = {}  # calls that ended, and seconds in them
        self._under_way: tuple[str, float] | None = None  # what it is in, and since when

    def begin(self, call: str, now_s: float) -> None:
        self._num_begun += 1
        self._under_way = (call, now_s)

    def end(self, now_s: float) -> None:
        """The call that began last is over. One that failed is never over: its group is not used again."""
        assert self._under_way is not None, "no call is under way"
        call, began_s = self._under_way
        num_calls, total_s = self._by_call.get(call, (0, 0.0))
        self._by_call[call] = (num_calls + 1, total_s + now_s - began_s)
        self._under_way = None

    def facts(self, group: str, now_s: float) -> GroupStats:
        """`group`: what this group is called."""
        under_way = self._under_way
        call, began_s = under_way or ("", now_s)
        return GroupStats(
            group=group,
            num_begun=self._num_begun,
            collectives=tuple(
                CollectiveStats(call=name, num_calls=num_calls, wait_s_total=total_s)
                for name, (num_calls, total_s) in sorted(self._by_call.copy().items())
            ),
            under_way=call,
            waiting_s=max(now_s - began_s, 0.0),
        )
