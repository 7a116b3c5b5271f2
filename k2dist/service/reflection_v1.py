"""Server reflection under its final name, grpc.reflection.v1.

grpcio-reflection 1.85 has v1alpha only, while newer clients ask for v1 first. The messages of the two are
the same on the wire, so v1 is v1alpha's servicer under another service name. (Not in the list of services:
a client that asks for what is listed could not be given v1's own descriptor.)
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

V1_NAME = "grpc.reflection.v1.ServerReflection"


def add_reflection_v1(service_names: Iterable[str], server: grpc.aio.Server) -> None:
    servicer = ReflectionServicer(service_names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(V1_NAME, handlers),))
