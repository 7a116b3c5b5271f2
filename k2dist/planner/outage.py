"""What the loss of one rank does to a simulation: when it comes, who waits for it, when its lane is back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from k2dist.ids import LaneId
from k2dist.messages import Request
from k2dist.planner.loss import Loss
from k2dist.planner.report import LossReport


class Outage:
    """Of `loss`, or of none. `waiting`: requests of the lost lane, until another has room for them."""

    def __init__(self, loss: Loss | None) -> None:
        self.waiting: deque[Request] = deque()
        self.report: LossReport | None = None
        self._loss = loss

    def due(self, now_s: float) -> Loss | None:
        """The loss, if it is time for it and it has not been met."""
        loss = self._loss
        return loss if loss is not None and self.report is None and now_s >= loss.at_s else None

    def meet(self, loss: Loss, requests: Sequence[Request]) -> None:
        """`requests`: what the lost lane had under way; their tokens are in the log, and computed again."""
        self.waiting.extend(requests)
        self.report = LossReport(
            world_rank=loss.world_rank,
            lane=loss.lane,
            at_s=loss.at_s,
            pause_s=loss.pause_s,
            lane_back_s=loss.at_s + loss.lane_back_s,
            num_readmitted=len(requests),
            num_tokens_recomputed=sum(
                len(request.prompt) + sum(map(len, request.generated.values())) for request in requests
            ),
        )

    @property
    def lost(self) -> tuple[LaneId, float] | None:
        """The lane that is or was away, and when it takes requests again."""
        report = self.report
        return None if report is None or report.lane is None else (LaneId(report.lane), report.lane_back_s)
