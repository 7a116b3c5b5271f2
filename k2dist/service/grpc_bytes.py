"""Bytes that are no message are the client's fault, and said so.

gRPC itself would answer UNKNOWN and log a traceback, as if they had broken the server.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from k2dist.errors import RequestError
from k2dist.service.error_codes import DETAILS_KEY, row_of, status_details

Behaviour = Callable[[Any, Any], Awaitable[Any]]
Read = Callable[[bytes], Any]


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """In the place of a message."""

    error: RequestError


class RefuseBadBytes(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """Of calls with one request message: all of ours, and health checks."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler  # type: ignore[no-any-return]  # None: there is no such method
        if handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        made: grpc.RpcMethodHandler[Any, Any] = make(
            _refusing(behaviour),
            request_deserializer=_reading(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return made


def _reading(read: Read) -> Read:
    def read_or_say(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError as error:
            return _Unreadable(RequestError("", f"the bytes are no message of this call: {error}"))

    return read_or_say


def _refusing(behaviour: Behaviour) -> Behaviour:
    assert not inspect.isasyncgenfunction(behaviour), "streams are written here, not yielded"

    async def behave(request: Any, context: Any) -> Any:
        if isinstance(request, _Unreadable):
            details = ((DETAILS_KEY, status_details(request.error)),)
            await context.abort(row_of(request.error).code, str(request.error), details)
        return await behaviour(request, context)

    return behave
