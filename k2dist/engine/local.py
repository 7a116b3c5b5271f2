"""A whole world in one process: ranks are threads, everything else is as on a cluster.

What differs from a cluster is only who hosts a rank and what carries the rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from k2dist.comm import Communicator, thread_group, thread_world
from k2dist.config import read_architecture
from k2dist.engine.lane import LanePort
from k2dist.engine.runtime import RankComms, RankRuntime, RankSpec
from k2dist.errors import CapacityError, K2Error, RequestError
from k2dist.ids import Generation, LaneId, RequestId
from k2dist.messages import FinishReason, Request, Sampling, TokenLogprob
from k2dist.parallel import Layout, check_layout, first_layout
from k2dist.scheduler import Limits


@dataclass(slots=True)
class Generated:
    """One output so far; `finish` is None while it runs."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str = ""


class LocalWorld:
    """Ranks as threads, from `__enter__` (weights are loaded then) to `__exit__`."""

    def __init__(
        self,
        model_dir: Path,
        layout: Layout | None = None,
        *,
        limits: Limits,
        page_tokens: int = 64,
        num_pages: int = 256,
        kernels: str = "auto",
        dtype: str = "bfloat16",
        step_deadline_s: float = 60.0,
    ) -> None:
        architecture = read_architecture(model_dir)
        self.layout = layout or first_layout(architecture, lanes=1, tp=1)
        check_layout(architecture, self.layout)
        self._step_deadline_s = step_deadline_s

        def spec(world_rank: int) -> RankSpec:
            return RankSpec(
                model_dir=str(model_dir),
                layout=self.layout,
                world_rank=world_rank,
                page_tokens=page_tokens,
                num_pages=num_pages,
                limits=limits,
                kernels=kernels,
                dtype=dtype,
            )

        self.ranks = [RankRuntime(spec(w)) for w in range(self.layout.world_size)]
        self.ports: list[LanePort] = [rank.port for rank in self.ranks if rank.port is not None]
        self._threads: list[threading.Thread] = []
        self._failures: list[K2Error] = []
        self._num_requests = 0

    def ring_all(self, epoch: int) -> None:
        for rank in self.ranks:
            rank.ring(epoch)

    def __enter__(self) -> LocalWorld:
        for rank, comms in zip(self.ranks, _connect(self.layout, self._step_deadline_s), strict=True):
            rank.load()
            rank.join(comms, self, Generation(0))
        self._threads = [
            threading.Thread(target=self._host, args=(rank,), name=f"rank-{w}")
            for w, rank in enumerate(self.ranks)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self.ranks:
            rank.stop()
        for thread in self._threads:
            thread.join()
        if self._failures and error is None:
            raise self._failures[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        lane_of: Callable[[int], int] | None = None,
    ) -> list[Generated]:
        """One output per prompt, in order. Prompt i goes to lane `lane_of(i)`, by default in turn."""
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        outputs: dict[RequestId, Generated] = {}
        after = [port.events(0, 0.0).next for port in self.ports]
        for i, (prompt, how) in enumerate(zip(prompts, samplings, strict=True)):
            lane = lane_of(i) if lane_of is not None else i % len(self.ports)
            request_id = RequestId(f"local-{self._num_requests}")
            self._num_requests += 1
            outputs[request_id] = Generated()
            (reply,) = self.ports[lane].admit(
                (Request(request_id=request_id, prompt=tuple(prompt), sampling=how),)
            )
            if reply.error:
                raise (
                    CapacityError(reply.error)
                    if reply.retry_can_help
                    else RequestError(reply.field, reply.error)
                )
        while any(output.finish is None for output in outputs.values()):
            for lane, port in enumerate(self.ports):
                batch = port.events(after[lane], timeout_s=0.01)
                after[lane] = batch.next
                for event in batch.events:
                    output = outputs.get(event.request_id)
                    if output is None:
                        continue  # of a request that somebody else admitted
                    output.token_ids += event.token_ids
                    output.logprobs += event.logprobs
                    output.finish, output.error = event.finish, event.error
        return list(outputs.values())

    def _host(self, rank: RankRuntime) -> None:
        try:
            rank.run()
        except K2Error as error:
            self._failures.append(error)


def _connect(layout: Layout, deadline_s: float) -> list[RankComms]:
    world = thread_world(layout.world_size, deadline_s)
    control = thread_world(layout.world_size, deadline_s)
    lane_groups: dict[int, tuple[Communicator, Communicator]] = {}
    for lane in range(layout.num_lanes):
        members = layout.members(LaneId(lane))
        groups = zip(thread_group(members, deadline_s), thread_group(members, deadline_s), strict=True)
        lane_groups |= dict(zip(members, groups, strict=True))
    return [
        RankComms(world[w], control[w], *lane_groups.get(w, (None, None))) for w in range(layout.world_size)
    ]
