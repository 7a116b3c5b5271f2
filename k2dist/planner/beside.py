"""The estimate beside the measurement, while a cluster serves: what a step should take, and what it does.

Both are of decoding: of what runs now, every lane as full as the fullest, with as many keys under each row as
pages in use can hold. Prompts among the measured steps make them longer than the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

from k2dist.messages import LaneLoad
from k2dist.observe import StepPair
from k2dist.planner.cost import StepModel
from k2dist.planner.work import LaneWork


class Beside:
    """Of one cluster. Time is an argument, and goes forward."""

    def __init__(self, model: StepModel, page_tokens: int) -> None:
        self._model = model
        self._page_tokens = page_tokens
        self._since: tuple[float, int] | None = None  # the last look that found work, and the steps by then

    def note(self, loads: Sequence[LaneLoad], now_s: float) -> StepPair | None:
        """What the lanes say now; None while there is nothing to compare: idle, or one look only.

        Measured is the mean since the look before this one, if both found somebody running.
        """
        before = self._since
        num_steps = max((load.num_steps for load in loads), default=0)
        num_running = sum(load.num_running for load in loads)
        if num_running == 0:
            self._since = None
            return None
        if before is not None and now_s <= before[0]:
            return None
        self._since = (now_s, num_steps)
        if before is None or num_steps <= before[1]:
            return None
        measured_s = (now_s - before[0]) / (num_steps - before[1])
        estimated_s = self._estimated_s(loads)
        return StepPair(
            estimated_step_s=estimated_s,
            measured_step_s=measured_s,
            estimated_tokens_per_s=num_running / estimated_s,
            measured_tokens_per_s=num_running / measured_s,
        )

    def _estimated_s(self, loads: Sequence[LaneLoad]) -> float:
        fullest = max(loads, key=lambda load: load.num_running)
        num_used = fullest.num_pages - fullest.num_pages_free
        rows = fullest.num_running
        work = LaneWork(
            num_rows=rows,
            own_rows=self._model.site.own_rows(rows),
            decode_rows=rows,
            num_keys=num_used * self._page_tokens / rows,
            prompt_rows=0,
        )
        return self._model.step(work, sum(load.num_running for load in loads)).step_s
