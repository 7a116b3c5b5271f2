"""A whole world in one process: ranks are threads, everything else is as on a cluster.

What differs from a cluster is only who hosts a rank and what carries the rows.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn

from k2dist.comm import Alone, Communicator, thread_group
from k2dist.config import read_architecture
from k2dist.engine.feed import Feed, Generated
from k2dist.engine.lane import LanePort
from k2dist.engine.runtime import RankComms, RankRuntime
from k2dist.engine.spec import RankSpec
from k2dist.errors import FencedError
from k2dist.ids import Generation, LaneId, RequestId
from k2dist.messages import RankProgress, Request, Sampling
from k2dist.parallel import Layout, check_layout, first_layout
from k2dist.scheduler import Limits

_WAIT_S = 0.05  # for the next event of any lane
_TOLD_S = 10.0  # from a lane's failure to its rank's: a few lines of the rank's thread


class LocalWorld:
    """Ranks as threads, from `start` (weights are loaded then) to `close`; or as a context.

    A rank that fails takes all others with it at once: requests end with an error, and `generate` raises what
    the rank raised. The threads are daemons: whoever owns a world closes it, also at the interpreter's end.
    """

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
        capacity_factor: float | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        experts_device: Literal["auto", "cpu"] = "auto",
        graphs: Literal["auto", "off", "twin"] = "auto",
        split_tokens: int | None = None,
        step_deadline_s: float = 60.0,
        retain_s: float = 60.0,
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
                capacity_factor=capacity_factor,
                retain_s=retain_s,
                device=device,
                experts_device=experts_device,
                graphs=graphs,
                split_tokens=split_tokens,
            )

        self.ranks = [RankRuntime(spec(w)) for w in range(self.layout.world_size)]
        self.ports: list[LanePort] = [rank.port for rank in self.ranks if rank.port is not None]
        self._threads: list[threading.Thread] = []
        self._failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._num_requests = 0

    def ring_all(self, epoch: int) -> None:
        for rank in self.ranks:
            rank.ring(epoch)

    def start(self, tell: Callable[[int, RankProgress], object] | None = None) -> None:
        """Load one rank after the other, and `tell` for each number how far it is; then run all, and return
        once they have recorded their steps."""
        for w, (rank, comms) in enumerate(
            zip(self.ranks, _connect(self.layout, self._step_deadline_s), strict=True)
        ):
            rank.load(None if tell is None else partial(tell, w))
            rank.join(comms, self, Generation(0))
        are_ready = [threading.Event() for _ in self.ranks]
        self._threads = [
            threading.Thread(target=self._host, args=(rank, is_ready), name=f"rank-{w}", daemon=True)
            for w, (rank, is_ready) in enumerate(zip(self.ranks, are_ready, strict=True))
        ]
        for thread in self._threads:
            thread.start()
        for is_ready in are_ready:
            is_ready.wait()
        failure = self.failure()
        if failure is not None:  # before any request could have heard of it
            raise failure

    def close(self) -> None:
        """Stop after the step under way, and wait for the threads. What still runs gets no further event."""
        for rank in self.ranks:
            rank.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():  # a rank's, when garbage is collected there
                thread.join()

    def failure(self, timeout_s: float = 0.0) -> BaseException | None:
        """What the first rank to fail raised, once one has; waits up to `timeout_s` for it."""
        if self._failure is None:
            with contextlib.suppress(queue.Empty):
                self._failure = self._failures.get(timeout=timeout_s)
        return self._failure

    def raise_failure(self) -> NoReturn:
        """Of a world in which a lane said that a rank failed: raise what that rank raised."""
        failure = self.failure(_TOLD_S)
        assert failure is not None, "a lane failed, and no rank"
        raise failure

    def __enter__(self) -> LocalWorld:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        failure = self.failure()
        if failure is not None and error is None:
            raise failure

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        lane_of: Callable[[int], int] | None = None,
    ) -> list[Generated]:
        """One output per prompt, in order. Prompt i goes to lane `lane_of(i)`, by default in turn.

        All are admitted at once: CapacityError if there are more than the lanes take, RequestError for the
        first that is wrong; what was admitted is then cancelled. `k2dist.LLM` is for any number of prompts.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        feed = Feed(self.ports, lane_outputs=len(prompts))
        outputs: list[Generated] = []
        try:
            for i, (prompt, how) in enumerate(zip(prompts, samplings, strict=True)):
                lane = lane_of(i) if lane_of is not None else i % len(self.ports)
                request_id = RequestId(f"local-{self._num_requests}")
                self._num_requests += 1
                request = Request(request_id=request_id, prompt=tuple(prompt), sampling=how)
                outputs += feed.put(request, lane)
            while len(feed) > 0:
                feed.wait(_WAIT_S)
        finally:
            feed.cancel()
        if any(port.has_failed for port in self.ports):
            self.raise_failure()
        return outputs

    def _host(self, rank: RankRuntime, is_ready: threading.Event) -> None:
        try:
            rank.record()
            is_ready.set()
            rank.run()
        except FencedError:
            return  # because of another rank, which says why
        except BaseException as error:  # noqa: BLE001  carried to the thread that waits, and raised there
            self._failures.put(error)
            for other in self.ranks:
                other.fence()
        finally:
            is_ready.set()


def _connect(layout: Layout, deadline_s: float) -> list[RankComms]:
    everyone = range(layout.world_size)
    world, control = _group(everyone, deadline_s), _group(everyone, deadline_s)
    lane_groups: dict[int, tuple[Communicator, Communicator]] = {}
    for lane in range(layout.num_lanes):
        members = layout.members(LaneId(lane))
        groups = zip(_group(members, deadline_s), _group(members, deadline_s), strict=True)
        lane_groups |= dict(zip(members, groups, strict=True))
    return [
        RankComms(world[w], control[w], *lane_groups.get(w, (None, None))) for w in range(layout.world_size)
    ]


def _group(members: Sequence[int], deadline_s: float) -> Sequence[Communicator]:
    """One communicator per member; who is alone waits for nobody and copies nothing."""
    return [Alone()] if len(members) == 1 else thread_group(members, deadline_s)
