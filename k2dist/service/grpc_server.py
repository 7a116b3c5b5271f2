"""The gRPC face: protobuf to and from `Generation`, statuses for errors, health and reflection.

Nothing is decided here. A handler that is cancelled (the client left, or its deadline passed) closes the
stream that it reads, which is what ends the request.
"""

# ruff: noqa: N802  RPCs are called what the proto calls them

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from k2dist._proto.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc, observe_pb2_grpc
from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.errors import CapacityError, RequestError
from k2dist.service.answer_events import AnswerEvent
from k2dist.service.auth import Caller, Gate, headers_of
from k2dist.service.beating import BeatingStream
from k2dist.service.coordinator import AbortResult
from k2dist.service.error_codes import statuses
from k2dist.service.forward import Forwarder, forward_call, forward_stream
from k2dist.service.generation import Generation
from k2dist.service.grpc_bytes import RefuseBadBytes
from k2dist.service.grpc_gate import GateInterceptor
from k2dist.service.observe_server import OBSERVE
from k2dist.service.reflection_v1 import add_reflection_v1
from k2dist.service.wire_events import write_event
from k2dist.service.wire_options import server_options
from k2dist.service.wire_requests import read_chat, read_positions, read_request

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
_RPCS_PER_STREAM = 4  # connections' worth of streams at a time, over all of them

_HEARTBEAT = pb.GenerateEvent(heartbeat=pb.Heartbeat())
_RESULTS = {
    AbortResult.ABORTED: pb.AbortResponse.RESULT_ABORTED,
    AbortResult.ALREADY_FINISHED: pb.AbortResponse.RESULT_ALREADY_FINISHED,
    AbortResult.NOT_FOUND: pb.AbortResponse.RESULT_NOT_FOUND,
}

Context = grpc.aio.ServicerContext[Any, Any]


class GrpcServer:
    """One grpc.aio server on one address. Begins NOT_SERVING; `set_serving` tells health checks."""

    def __init__(
        self,
        generation: Generation,
        control: control_pb2_grpc.ControlServicer,
        observe: observe_pb2_grpc.ObserveServicer,
        gate: Gate,
        forwarder: Forwarder,
        *,
        max_streams: int,
    ) -> None:
        """`max_streams`: of one connection."""
        self._server = grpc.aio.server(
            interceptors=[GateInterceptor(gate), RefuseBadBytes()],
            options=server_options(max_streams),
            maximum_concurrent_rpcs=_RPCS_PER_STREAM * max_streams,
        )
        self._health = HealthServicer()
        names = (INFERENCE, CONTROL, OBSERVE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        inference = InferenceServicer(generation, gate, forwarder)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        observe_pb2_grpc.add_ObserveServicer_to_server(observe, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(names, self._server)
        add_reflection_v1(names, self._server)

    async def start(self, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen, and return the port (`port` 0: any free one). CapacityError if it is taken."""
        await self.set_serving(False)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = (
                self._server.add_insecure_port(address)
                if credentials is None
                else self._server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            raise CapacityError(
                f"service.grpc: cannot listen on {host}:{port}; is another k2dist running there? "
                "Stop it, or choose another port"
            ) from error
        await self._server.start()
        return bound

    async def set_serving(self, is_serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_serving else statuses.NOT_SERVING
        for service in ("", INFERENCE, CONTROL, OBSERVE):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`k2dist.v1.Inference`. Streams are written rather than yielded: a coroutine's `finally` always runs."""

    def __init__(self, generation: Generation, gate: Gate, forwarder: Forwarder) -> None:
        self._generation = generation
        self._gate = gate
        self._forwarder = forwarder

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        async with statuses(context):
            if request.request_id and (peer := self._forwarder.peer(request.request_id, context)):
                await forward_stream(peer, "Generate", request, context)
                return
            asked, parent = read_request(request), _traceparent(context)
            events = self._generation.generate(asked, self._caller(context), traceparent=parent)
            await self._write(events, context)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:  # type: ignore[override]
        async with statuses(context):
            if peer := self._forwarder.peer(request.request_id, context):
                await forward_stream(peer, "Resume", request, context)
                return
            positions = read_positions(getattr(request, "from"))
            events = self._generation.resume(request.request_id, positions, self._caller(context))
            await self._write(events, context)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        async with statuses(context):
            if peer := self._forwarder.peer(request.request_id, context):
                response: pb.AbortResponse = await forward_call(peer, "Abort", request, context)
                return response
            outcome = await self._generation.abort(request.request_id, self._caller(context))
            return pb.AbortResponse(result=_RESULTS[outcome.result], completion_tokens=outcome.num_tokens)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with statuses(context):
            if request.page_token:
                raise RequestError("page_token", "unknown; there is one page only")
            model = self._generation.model
            message = pb.Model(
                name=model.name,
                max_positions=model.max_positions,
                vocab_size=model.vocab_size,
                end_token_ids=sorted(model.end_token_ids),
            )
            return pb.ListModelsResponse(models=[message])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with statuses(context):
            self._generation.check_model(request.model)
            caller, allow_special = self._caller(context), request.allow_special
            ids = await self._generation.tokenize(request.text, caller, allow_special=allow_special)
            return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with statuses(context):
            self._generation.check_model(request.model)
            skip_special = request.skip_special
            raw = self._generation.tokenizer.decode_bytes(request.token_ids, skip_special=skip_special)
            return pb.DetokenizeResponse(text=raw.decode(errors="replace"), raw=raw)

    async def ApplyChatTemplate(
        self, request: pb.ApplyChatTemplateRequest, context: Context
    ) -> pb.ApplyChatTemplateResponse:
        async with statuses(context):
            self._generation.check_model(request.model)
            is_opened = not request.HasField("add_generation_prompt") or request.add_generation_prompt
            chat = read_chat(request.chat)
            ids, text = await self._generation.apply_template(
                chat, self._caller(context), add_generation_prompt=is_opened
            )
            return pb.ApplyChatTemplateResponse(token_ids=ids, text=text)

    async def _write(self, events: AsyncGenerator[AnswerEvent], context: Context) -> None:
        token_bytes = self._generation.tokenizer.token_bytes
        async with aclosing(events), BeatingStream(context, _HEARTBEAT) as stream:
            async for event in events:
                await stream.write(write_event(event, token_bytes))

    def _caller(self, context: Context) -> Caller:
        return self._gate.identify(headers_of(context.invocation_metadata()))


def _traceparent(context: Context) -> str:
    """W3C's, of the span that calls; "" if there is none."""
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("traceparent", ""))
