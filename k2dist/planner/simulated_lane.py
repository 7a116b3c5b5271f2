"""One lane of a simulation: the real scheduler and pages, and what each of its plans asks of the devices."""

from __future__ import annotations

from k2dist.cache import PagePool
from k2dist.config.cluster import ClusterConfig
from k2dist.ids import SeqId
from k2dist.messages import StepPlan
from k2dist.planner.site import Site
from k2dist.planner.work import LaneWork
from k2dist.scheduler import Limits, Scheduler


class SimulatedLane:
    """`num_outputs`: sent to it and not ended, which is what the router sees."""

    def __init__(self, config: ClusterConfig, site: Site, *, is_up: bool = True) -> None:
        self.is_up = is_up
        self.num_outputs = 0
        self.scheduler = Scheduler(
            Limits.of(config),
            PagePool(config.cache.num_pages, config.cache.page_tokens),
            end_token_ids=frozenset(),
            token_bytes=_no_bytes,
            max_positions=site.architecture.max_positions,
        )
        self._site = site
        self._prompt_len: dict[SeqId, int] = {}

    def note_new(self, plan: StepPlan) -> int:
        """How many of the plan's new sequences ran before: somebody took their pages."""
        num_before = sum(new.seq_id in self._prompt_len for new in plan.new)
        self._prompt_len |= {new.seq_id: len(new.prompt) for new in plan.new}
        return num_before

    def work(self, plan: StepPlan) -> LaneWork:
        decode_rows = prompt_rows = prompts = starts = 0
        keys = 0
        for grant in plan.grants:
            if grant.start < self._prompt_len[grant.seq_id]:
                prompts += 1
                prompt_rows += grant.num_tokens
                starts += grant.start
            else:
                decode_rows += grant.num_tokens
                keys += grant.num_tokens * (grant.start + 1)
        rows = decode_rows + prompt_rows
        return LaneWork(
            num_rows=rows,
            own_rows=self._site.own_rows(rows),
            decode_rows=decode_rows,
            num_keys=keys / max(decode_rows, 1),
            prompt_rows=prompt_rows,
            prompts=max(prompts, 1),
            prompt_start=starts / max(prompts, 1),
        )


def _no_bytes(token_id: int) -> bytes:
    return b""
