"""`k2dist.v1.Observe` over gRPC, and the same from the other side."""

# ruff: noqa: N802  RPCs are called what the proto calls them

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from k2dist._proto.v1 import observe_pb2 as pb
from k2dist._proto.v1 import observe_pb2_grpc
from k2dist.observe import ClusterState, RequestBook, Trace
from k2dist.service.auth import Gate, headers_of
from k2dist.service.error_codes import UnknownRequestError, statuses
from k2dist.service.owned_ids import inner_id
from k2dist.service.state import StateWatch

OBSERVE = pb.DESCRIPTOR.services_by_name["Observe"].full_name
_ENCODER = msgspec.json.Encoder()


class ObserveServicer(observe_pb2_grpc.ObserveServicer):
    """A key finds its own requests; an operator's finds any by the name that logs have for it."""

    def __init__(self, watch: StateWatch, book: RequestBook, gate: Gate) -> None:
        self._watch = watch
        self._book = book
        self._gate = gate

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        async with statuses(context):
            return pb.GetStateResponse(json=_ENCODER.encode(await self._watch.look()))

    async def GetTrace(self, request: pb.GetTraceRequest, context: Any) -> pb.GetTraceResponse:
        async with statuses(context):
            caller = self._gate.identify(headers_of(context.invocation_metadata()))
            trace = self._book.trace(inner_id(caller.key_id, request.request_id))
            if trace is None and caller.role == "operator":
                trace = self._book.trace(request.request_id)
            if trace is None:
                raise UnknownRequestError(
                    "request_id", f"{request.request_id!r} is not known here; it may have ended long ago"
                )
            trace = replace(trace, request_id=request.request_id)  # as its caller knows it
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
