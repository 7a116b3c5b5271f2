"""No call gets past without its key: what a gRPC server asks before it reads a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from k2dist.errors import K2Error
from k2dist.service.auth import Gate, headers_of
from k2dist.service.error_codes import abort


class GateInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Answers calls that `Gate.check_method` refuses, in the place of their methods; methods that nobody has
    thought of are refused too. The request is not even parsed."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        headers = headers_of(handler_call_details.invocation_metadata)
        try:
            self._gate.check_method(handler_call_details.method, headers)
        except K2Error as error:
            return _refusing(error, handler)
        return handler


def _refusing(
    error: K2Error, handler: grpc.RpcMethodHandler[Any, Any] | None
) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, error)

    is_stream_in = handler is not None and handler.request_streaming
    is_stream_out = handler is not None and handler.response_streaming
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[is_stream_in, is_stream_out]
    refusing: grpc.RpcMethodHandler[Any, Any] = make(refuse)
    return refusing
