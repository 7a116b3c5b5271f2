"""`k2dist.v1.Observe` over gRPC, and the same from the other side."""

# ruff: noqa: N802  RPCs are called what the proto calls them

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec

from k2dist._proto.v1 import observe_pb2 as pb
from k2dist._proto.v1 import observe_pb2_grpc
from k2dist.observe import ClusterState, RequestBook, Trace
from k2dist.service.error_codes import UnknownRequestError
from k2dist.service.state import StateWatch

OBSERVE = pb.DESCRIPTOR.services_by_name["Observe"].full_name
_ENCODER = msgspec.json.Encoder()


class ObserveServicer(observe_pb2_grpc.ObserveServicer):
    """`statuses`: a context that turns errors into statuses."""

    def __init__(
        self,
        watch: StateWatch,
        book: RequestBook,
        statuses: Callable[[Any], AbstractAsyncContextManager[None]],
    ) -> None:
        self._watch = watch
        self._book = book
        self._statuses = statuses

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        async with self._statuses(context):
            return pb.GetStateResponse(json=_ENCODER.encode(await self._watch.look()))

    async def GetTrace(self, request: pb.GetTraceRequest, context: Any) -> pb.GetTraceResponse:
        async with self._statuses(context):
            trace = self._book.trace(request.request_id)
            if trace is None:
                raise UnknownRequestError(
                    "request_id", f"{request.request_id!r} is not known here; it may have ended long ago"
                )
            return pb.GetTraceResponse(json=_ENCODER.encode(trace))


class ObserveClient:
    """Of one channel. `call(method, message)` awaits an answer, and turns a status into an error."""

    def __init__(self, channel: Any, call: Any) -> None:
        self._stub = observe_pb2_grpc.ObserveStub(channel)
        self._call = call

    async def state(self) -> ClusterState:
        response = await self._call(self._stub.GetState, pb.GetStateRequest())
        return _STATES.decode(response.json)

    async def trace(self, request_id: str) -> Trace:
        """UnknownRequestError: never accepted there, or forgotten."""
        response = await self._call(self._stub.GetTrace, pb.GetTraceRequest(request_id=request_id))
        return _TRACES.decode(response.json)


_STATES = msgspec.json.Decoder(ClusterState)
_TRACES = msgspec.json.Decoder(Trace)
