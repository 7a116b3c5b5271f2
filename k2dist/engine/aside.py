"""A thread that makes calls beside the work that waits for them; on a CUDA device it has its own stream."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from k2dist.model.pieces import Call, Waiting


class Aside:
    """One rank's, in one generation. Calls are made one after another, in the order of `begin`."""

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, call: Call) -> Waiting:
        """Start `call` behind what the current stream has queued; to be waited for on that stream."""
        if self._stream is None:
            return self._thread.submit(_infer, call).result
        stream, queued = self._stream, torch.cuda.current_stream().record_event()
        called = self._thread.submit(_infer_on, stream, queued, call)

        def wait() -> Tensor:
            result, done = called.result()
            current = torch.cuda.current_stream()
            current.wait_event(done)
            result.record_stream(current)  # its memory is not the stream's again before it was read
            return result

        return wait


def _infer(call: Call) -> Tensor:
    """As the device thread does."""
    with torch.inference_mode():
        return call()


def _infer_on(
    stream: torch.cuda.Stream, queued: torch.cuda.Event, call: Call
) -> tuple[Tensor, torch.cuda.Event]:
    with torch.cuda.stream(stream):
        stream.wait_event(queued)
        return _infer(call), stream.record_event()
