"""Work that is recorded once and replayed: CUDA graphs, and a twin that computes anew what they would.

What is recorded reads and writes tensors that stay where they are; whoever replays it copies new numbers in
first. With `calls_outside` a recording is of pieces (`model.pieces`), and their calls are made between them:
to experts on the CPU, over a transport that no graph can hold.

    graph 0 ── call ── copied to where graph 1 reads it ── graph 1 ── call ── ... ── graph n

A recording holds the communicators that it was made with, and goes with their generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from k2dist.model.pieces import Call, Pieces, in_line

Begin = Callable[[], Pieces]


class Recording(Protocol):
    def replay(self) -> Tensor:
        """Do it again; the same tensor every time, overwritten by the next replay of any recording."""
        ...


class Recorder(Protocol):
    """How work becomes a recording. One rank's, used by its device thread."""

    def record(self, begin: Begin) -> Recording:
        """Of work that has run before in the same shapes: kernels are compiled, memory is there.

        Between peers nothing moves but the calls of work with calls outside, once.
        """
        ...


class CudaRecorder:
    """Graphs of one device, which share their memory: they are replayed one after another."""

    def __init__(self, *, calls_outside: bool) -> None:
        self._calls_outside = calls_outside
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, begin: Begin) -> CudaRecording:
        pieces = begin()
        segments: list[tuple[torch.cuda.CUDAGraph, Call, Tensor]] = []
        given: Tensor | None = None  # what the last call gave, where the next piece reads it
        while True:
            graph, call = torch.cuda.CUDAGraph(), None
            with self._capturing(graph):
                try:
                    call = pieces.send(given) if given is not None else next(pieces)
                    while not self._calls_outside:
                        call = pieces.send(call())
                except StopIteration as end:
                    return CudaRecording(segments, graph, end.value)
            graph.replay()
            given = call().clone()
            segments.append((graph, call, given))

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """`torch.cuda.graph` without its clean-up: that gives the allocator's memory back to the driver, 70
        times, and the first steps would have to ask for it again.

        Other threads go on meanwhile: the step loop copies, NCCL's looks at its events.
        """
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()


class CudaRecording:
    """See `CudaRecorder`. `result` is in the graphs' memory."""

    def __init__(
        self,
        segments: list[tuple[torch.cuda.CUDAGraph, Call, Tensor]],
        last: torch.cuda.CUDAGraph,
        result: Tensor,
    ) -> None:
        self._segments = segments
        self._last = last
        self._result = result

    def replay(self) -> Tensor:
        for graph, call, given in self._segments:
            graph.replay()
            given.copy_(call())
        self._last.replay()
        return self._result


class TwinRecorder:
    """What a graph means, on any device and over any transport: the work is done anew, into the same tensor.

    `poison` is called before each replay, to spoil what a replay must not read.
    """

    def __init__(self, poison: Callable[[], None]) -> None:
        self._poison = poison

    def record(self, begin: Begin) -> TwinRecording:
        return TwinRecording(begin, self._poison)


class TwinRecording:
    def __init__(self, begin: Begin, poison: Callable[[], None]) -> None:
        self._begin = begin
        self._poison = poison
        self._result: Tensor | None = None

    def replay(self) -> Tensor:
        self._poison()
        result = in_line(self._begin())
        if self._result is None:
            self._result = torch.empty_like(result)
        self._result.fill_(torch.nan)
        return self._result.copy_(result)
