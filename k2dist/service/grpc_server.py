"""The gRPC face: protobuf to and from `Generation`, statuses for errors, health and reflection.

Nothing is decided here. A handler that is cancelled (the client left, or its deadline passed) closes the
stream that it reads, which is what ends the request.
"""

# ruff: noqa: N802  RPCs are called what the proto calls them

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from k2dist._proto.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc, observe_pb2_grpc
from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.errors import CapacityError, K2Error, RequestError
from k2dist.messages import LaneLoad
from k2dist.service.answer_events import AnswerEvent
from k2dist.service.coordinator import AbortResult, Coordinator
from k2dist.service.error_codes import DETAILS_KEY, row_of, status_details
from k2dist.service.generation import AnswerStyle, Generation
from k2dist.service.grpc_bytes import RefuseBadBytes
from k2dist.service.observe_server import OBSERVE, ObserveServicer
from k2dist.service.planning import Planning
from k2dist.service.reflection_v1 import add_reflection_v1
from k2dist.service.state import StateWatch
from k2dist.service.wire_events import write_event
from k2dist.service.wire_requests import read_chat, read_positions, read_request

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
MAX_MESSAGE_BYTES = 16 * 2**20  # a prompt of 2**20 ids is 3 MiB; a conversation as text may be some more

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # else a second server on the port would bind in silence
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A long prompt leaves a stream silent; clients that ping meanwhile are not to be sent away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


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
        cluster: str,
        generation: Generation,
        coordinator: Coordinator[AnswerStyle],
        planning: Planning,
        watch: StateWatch,
    ) -> None:
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=(RefuseBadBytes(),))
        self._health = HealthServicer()
        names = (INFERENCE, CONTROL, OBSERVE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(generation), self._server)
        control = ControlServicer(cluster, generation.model.name, coordinator, planning)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        observe = ObserveServicer(watch, coordinator.book, _statuses)
        observe_pb2_grpc.add_ObserveServicer_to_server(observe, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(names, self._server)
        add_reflection_v1(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port (`port` 0: any free one). CapacityError if it is taken."""
        await self.set_serving(False)
        try:
            bound = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
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

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        async with _statuses(context):
            asked, parent = read_request(request), _traceparent(context)
            await self._write(self._generation.generate(asked, traceparent=parent), context)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:  # type: ignore[override]
        async with _statuses(context):
            positions = read_positions(getattr(request, "from"))
            await self._write(self._generation.resume(request.request_id, positions), context)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        async with _statuses(context):
            outcome = await self._generation.abort(request.request_id)
            return pb.AbortResponse(result=_RESULTS[outcome.result], completion_tokens=outcome.num_tokens)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with _statuses(context):
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
        async with _statuses(context):
            self._generation.check_model(request.model)
            ids = await self._generation.tokenize(request.text, allow_special=request.allow_special)
            return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with _statuses(context):
            self._generation.check_model(request.model)
            skip_special = request.skip_special
            raw = self._generation.tokenizer.decode_bytes(request.token_ids, skip_special=skip_special)
            return pb.DetokenizeResponse(text=raw.decode(errors="replace"), raw=raw)

    async def ApplyChatTemplate(
        self, request: pb.ApplyChatTemplateRequest, context: Context
    ) -> pb.ApplyChatTemplateResponse:
        async with _statuses(context):
            self._generation.check_model(request.model)
            is_opened = not request.HasField("add_generation_prompt") or request.add_generation_prompt
            chat = read_chat(request.chat)
            ids, text = await self._generation.apply_template(chat, add_generation_prompt=is_opened)
            return pb.ApplyChatTemplateResponse(token_ids=ids, text=text)

    async def _write(self, events: AsyncGenerator[AnswerEvent], context: Context) -> None:
        async with aclosing(events):
            async for event in events:
                await context.write(write_event(event, self._generation.tokenizer.token_bytes))


class ControlServicer(control_pb2_grpc.ControlServicer):
    """`k2dist.v1.Control`."""

    def __init__(
        self, cluster: str, model: str, coordinator: Coordinator[AnswerStyle], planning: Planning
    ) -> None:
        self._cluster = cluster
        self._model = model
        self._coordinator = coordinator
        self._planning = planning

    async def GetTopology(
        self, request: control_pb2.GetTopologyRequest, context: Context
    ) -> control_pb2.GetTopologyResponse:
        async with _statuses(context):
            loads = await self._coordinator.loads()
            is_draining = self._coordinator.is_draining
            return control_pb2.GetTopologyResponse(
                cluster=self._cluster,
                model=self._model,
                state=control_pb2.SERVICE_STATE_DRAINING
                if is_draining
                else control_pb2.SERVICE_STATE_SERVING,
                lanes=map(_write_load, loads),
                queued_requests=self._coordinator.num_queued,
                live_outputs=self._coordinator.num_outputs,
            )

    async def Plan(self, request: control_pb2.PlanRequest, context: Context) -> control_pb2.PlanResponse:
        async with _statuses(context):
            return await self._planning.plan(request)


def _traceparent(context: Context) -> str:
    """W3C's, of the span that calls; "" if there is none."""
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("traceparent", ""))


@asynccontextmanager
async def _statuses(context: Context) -> AsyncIterator[None]:
    """Turns a K2Error, which can only come before the first event, into a status with details."""
    try:
        yield
    except K2Error as error:
        metadata = ((DETAILS_KEY, status_details(error)),)
        await context.abort(row_of(error).code, str(error), metadata)


def _write_load(load: LaneLoad) -> control_pb2.LaneState:
    return control_pb2.LaneState(
        lane=load.lane,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_pages=load.num_pages,
        num_pages_free=load.num_pages_free,
        num_steps=load.num_steps,
    )
