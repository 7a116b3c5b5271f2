"""A client of `k2dist.v1.Inference`: asyncio first, and a thin synchronous face for scripts.

    async with AsyncClient("127.0.0.1:8400") as client:
        async for event in client.chat([ChatMessage(role="user", content="Hello")]):
            ...

Errors are k2dist's own (`error_codes.error_of`). Leaving an iterator ends its request, unless it is detached.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from k2dist._proto.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.errors import UnavailableError
from k2dist.messages import ChatMessage
from k2dist.observe import Trace
from k2dist.service.answer_events import AnswerEvent
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling, Position
from k2dist.service.error_codes import error_of
from k2dist.service.lasting import generate_lasting
from k2dist.service.observe_server import ObserveClient
from k2dist.service.tls import ClientTls, open_channel
from k2dist.service.wire_events import read_event
from k2dist.service.wire_requests import write_chat, write_request

UNARY_TIMEOUT_S = 30.0
# A loop outlives its client: what gRPC has to say of calls that were cancelled comes after, through whatever
# loop of this process is awake, which would complain of one that is closed. 9 of 60 clients did, at Ctrl-C.
_LINGER_S = 1.0
T = TypeVar("T")
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # not in its stubs


class AsyncClient:
    """One channel to one coordinator. Any number of calls at once, all on the event loop it was made in.

    tls: None: in the clear. api_key: sent with every call; empty: none is.
    """

    def __init__(self, address: str, *, tls: ClientTls | None = None, api_key: str = "") -> None:
        """ConfigError: a file of `tls` cannot be used."""
        self.address = address
        self.spelling: dict[int, bytes] = {}  # of the tokens whose logprobs have come so far
        self._headers: tuple[tuple[str, str], ...] = (
            (("authorization", f"Bearer {api_key}"),) if api_key else ()
        )
        self._channel = open_channel(address, tls)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self.observe = ObserveClient(self._channel, self._call)

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def on_behalf(self, headers: Mapping[str, str]) -> AsyncClient:
        """This client with another's credentials, over the same channel, which stays this one's to close."""
        other = copy.copy(self)
        other._headers = tuple(headers.items())
        return other

    def generate(
        self, request: ClientRequest, *, timeout_s: float | None = None, traceparent: str = ""
    ) -> AsyncGenerator[AnswerEvent]:
        """The answer's events as they come; the request goes out when the first is awaited. A lost connection
        is an UnavailableError: see `generate_lasting`.

        `timeout_s`: for all of it; None: as long as it takes. `traceparent`: W3C's, of the span that asks.
        """
        return self._read(self._inference.Generate, write_request(request), timeout_s, traceparent)

    def generate_lasting(
        self, request: ClientRequest, *, reconnect_s: float = 60.0
    ) -> AsyncGenerator[AnswerEvent]:
        """`generate` that reads on after a lost connection, unless nobody answers for `reconnect_s`."""
        return generate_lasting(self, request, reconnect_s=reconnect_s)

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[dict[str, Any]] = (),
        sampling: PartialSampling | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[AnswerEvent]:
        """`generate` for a conversation."""
        chat = Chat(messages=tuple(messages), tools=tuple(tools))
        request = ClientRequest(prompt=chat, sampling=sampling or PartialSampling())
        return self.generate(request, timeout_s=timeout_s)

    def resume(self, request_id: str, positions: Sequence[Position] = ()) -> AsyncGenerator[AnswerEvent]:
        """The answer of an accepted request, each output from its position on."""
        message = pb.ResumeRequest(request_id=request_id)
        for position in positions:
            getattr(message, "from").add(output_index=position.output_index, token_index=position.token_index)
        return self._read(self._inference.Resume, message, None)

    async def abort(self, request_id: str) -> pb.AbortResponse:
        message = pb.AbortRequest(request_id=request_id)
        response: pb.AbortResponse = await self._call(self._inference.Abort, message)
        return response

    async def models(self) -> list[pb.Model]:
        response = await self._call(self._inference.ListModels, pb.ListModelsRequest())
        return list(response.models)

    async def tokenize(self, text: str, *, allow_special: bool = False) -> list[int]:
        message = pb.TokenizeRequest(text=text, allow_special=allow_special)
        return list((await self._call(self._inference.Tokenize, message)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        message = pb.DetokenizeRequest(token_ids=token_ids, skip_special=skip_special)
        return str((await self._call(self._inference.Detokenize, message)).text)

    async def token_bytes(self, token_ids: Sequence[int]) -> bytes:
        """What `detokenize` makes text of."""
        message = pb.DetokenizeRequest(token_ids=token_ids)
        return bytes((await self._call(self._inference.Detokenize, message)).raw)

    async def apply_chat_template(
        self, chat: Chat, *, add_generation_prompt: bool = True
    ) -> pb.ApplyChatTemplateResponse:
        message = pb.ApplyChatTemplateRequest(
            chat=write_chat(chat), add_generation_prompt=add_generation_prompt
        )
        response: pb.ApplyChatTemplateResponse = await self._call(self._inference.ApplyChatTemplate, message)
        return response

    async def plan(self, request: control_pb2.PlanRequest) -> control_pb2.PlanResponse:
        """What a config would hold and give, by the server's planner: `planner.plan.ClusterPlan` as JSON."""
        response: control_pb2.PlanResponse = await self._call(self._control.Plan, request)
        return response

    async def topology(self) -> control_pb2.GetTopologyResponse:
        message = control_pb2.GetTopologyRequest()
        response: control_pb2.GetTopologyResponse = await self._call(self._control.GetTopology, message)
        return response

    async def watch(self, start_revision: int = 0) -> AsyncGenerator[control_pb2.WatchClusterResponse]:
        """The cluster's changes from a revision on; 0: its present state first. CompactedError: begin
        anew."""
        message = control_pb2.WatchClusterRequest(start_revision=start_revision)
        call = self._control.WatchCluster(message, metadata=self._headers)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self.address) from error
        finally:
            call.cancel()

    async def drain(self, timeout_s: float | None = None) -> control_pb2.DrainResponse:
        """Let the cluster take no more requests; answers when none is left, or after `timeout_s`."""
        message = control_pb2.DrainRequest(timeout_s=timeout_s)
        response: control_pb2.DrainResponse = await self._call(self._control.Drain, message, None)
        return response

    async def _read(
        self, method: Any, message: Any, timeout_s: float | None, traceparent: str = ""
    ) -> AsyncGenerator[AnswerEvent]:
        metadata = (*self._headers, *((("traceparent", traceparent),) if traceparent else ()))
        call = method(message, timeout=timeout_s, metadata=metadata)  # with the first `anext`, on the loop
        try:
            # Not `async for`, which goes through two generators more.
            while (message := await call.read()) is not _EOF:
                event = read_event(message, self.spelling)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self.address) from error
        finally:
            call.cancel()  # without effect on a call that is done

    async def _call(self, method: Any, message: Any, timeout_s: float | None = UNARY_TIMEOUT_S) -> Any:
        try:
            return await method(message, timeout=timeout_s, metadata=self._headers)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self.address) from error


class Client:
    """`AsyncClient` for code without an event loop: it runs one in a thread. Close it after use; what other
    threads still read from it ends then with an UnavailableError."""

    def __init__(self, address: str, *, tls: ClientTls | None = None, api_key: str = "") -> None:
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), name="k2dist-client", daemon=True).start()
        self._client = self._await(_connect(address, tls, api_key))

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.call_later, _LINGER_S, self._loop.stop)

    async def _end(self) -> None:
        """Nothing is left on the loop: what is destroyed with it unfinished, asyncio complains of."""
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, request: ClientRequest, *, timeout_s: float | None = None) -> Iterator[AnswerEvent]:
        """Events as they come; closing the iterator ends the request, unless it is detached."""
        return self._drain(self._client.generate(request, timeout_s=timeout_s))

    def generate_lasting(self, request: ClientRequest, *, reconnect_s: float = 60.0) -> Iterator[AnswerEvent]:
        return self._drain(self._client.generate_lasting(request, reconnect_s=reconnect_s))

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[dict[str, Any]] = (),
        sampling: PartialSampling | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[AnswerEvent]:
        return self._drain(self._client.chat(messages, tools=tools, sampling=sampling, timeout_s=timeout_s))

    def resume(self, request_id: str, positions: Sequence[Position] = ()) -> Iterator[AnswerEvent]:
        return self._drain(self._client.resume(request_id, positions))

    def abort(self, request_id: str) -> pb.AbortResponse:
        return self._await(self._client.abort(request_id))

    def models(self) -> list[pb.Model]:
        return self._await(self._client.models())

    def tokenize(self, text: str, *, allow_special: bool = False) -> list[int]:
        return self._await(self._client.tokenize(text, allow_special=allow_special))

    def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._await(self._client.detokenize(token_ids, skip_special=skip_special))

    def apply_chat_template(
        self, chat: Chat, *, add_generation_prompt: bool = True
    ) -> pb.ApplyChatTemplateResponse:
        return self._await(
            self._client.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
        )

    def topology(self) -> control_pb2.GetTopologyResponse:
        return self._await(self._client.topology())

    def trace(self, request_id: str) -> Trace:
        """What has happened to a request; UnknownRequestError: never accepted there, or forgotten."""
        return self._await(self._client.observe.trace(request_id))

    def drain(self, timeout_s: float | None = None) -> control_pb2.DrainResponse:
        return self._await(self._client.drain(timeout_s))

    def _drain(self, events: AsyncGenerator[AnswerEvent]) -> Iterator[AnswerEvent]:
        try:
            while (event := self._await(_next(events))) is not None:
                yield event
        finally:
            if not self._is_closed:
                self._await(events.aclose())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        if self._is_closed:
            work.close()
            raise UnavailableError("this client is closed")
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(partial(_tell, outcome))

        self._loop.call_soon_threadsafe(begin)
        try:
            return outcome.result()
        except asyncio.CancelledError as error:
            raise UnavailableError("this client was closed meanwhile") from error
        except KeyboardInterrupt:
            # Ended, and not only told to end: an iterator that is still running cannot be closed.
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            wait([outcome], UNARY_TIMEOUT_S)
            raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _tell(outcome: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        outcome.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


async def _connect(address: str, tls: ClientTls | None, api_key: str) -> AsyncClient:
    return AsyncClient(
        address, tls=tls, api_key=api_key
    )  # here, because a channel belongs to the running loop


async def _next(events: AsyncGenerator[AnswerEvent]) -> AnswerEvent | None:
    return await anext(events, None)
