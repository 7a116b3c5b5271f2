"""A server under load, reached as its clients reach it: OpenAI's API over HTTP, or k2dist's own over gRPC.

Any server of OpenAI's API will do, if it takes token ids and `ignore_eos` (made-up prompts need both).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Protocol, Self

import aiohttp
import msgspec
from msgspec.structs import replace

from k2dist.bench.serve_asks import Ask
from k2dist.bench.serve_report import Sample
from k2dist.errors import K2Error, UnavailableError, UsageError
from k2dist.service.answer_events import Delta, Failed, Finished
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.openai_requests import read_chat_body
from k2dist.service.tls import ClientTls, client_context

_MAX_ERROR_CHARS = 200
_CONNECT_S = 30.0
_DONE = b"[DONE]"


class Target(Protocol):
    """Used as a context, on one event loop."""

    url: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def ask(self, ask: Ask, sample: Sample) -> None:
        """One request to its end; what comes is noted in `sample`, and so is what goes wrong."""


def make_target(
    url: str, *, model: str, timeout_s: float, tls: ClientTls | None = None, api_key: str = ""
) -> Target:
    """`url`: http://, https:// or grpc://host:port. UsageError: another, or one that takes no `tls`.

    `tls` None: grpc in the clear, https by the CAs that this machine trusts. `api_key` empty: none is sent.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "http" and tls is not None:
        raise UsageError(f"--url={url}: --ca is for TLS; use https:// or grpc://")
    if scheme in ("http", "https") and rest:
        return HttpTarget(url, model=model, timeout_s=timeout_s, tls=tls, api_key=api_key)
    if scheme == "grpc" and rest:
        return GrpcTarget(url, model=model, timeout_s=timeout_s, tls=tls, api_key=api_key)
    raise UsageError(f"--url={url}: use http://HOST:PORT, https://HOST:PORT or grpc://HOST:PORT")


class HttpTarget:
    """`url` with or without /v1. `model` empty: the first one that the server lists."""

    def __init__(
        self, url: str, *, model: str, timeout_s: float, tls: ClientTls | None, api_key: str
    ) -> None:
        self.url = url
        self._tls = tls
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # No bound of its own on connections: how many there may be is for the load to say.
        connector = aiohttp.TCPConnector(
            limit=0, ssl=True if self._tls is None else client_context(self._tls)
        )
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=self._timeout
        )
        if not self._model:
            try:
                self._model = await self._first_model()
            except BaseException:
                await self._session.close()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def ask(self, ask: Ask, sample: Sample) -> None:
        assert self._session is not None
        path = "/completions" if ask.chat is None else "/chat/completions"
        try:
            async with self._session.post(self._base + path, json=self._body(ask)) as response:
                if response.status != 200:
                    sample.error = _said(response.status, await response.read())
                    return
                await _read_stream(response, sample)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            sample.error = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]

    async def _first_model(self) -> str:
        assert self._session is not None
        try:
            async with self._session.get(self._base + "/models") as response:
                if response.status != 200:
                    raise UnavailableError(f"{self.url}: {_said(response.status, await response.read())}")
                return str((await response.json())["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(f"{self.url}: no server answers ({error}); is it running?") from error
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{self.url}/v1/models: not a list of models, as OpenAI has it") from error

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": ask.token_ids} if ask.chat is None else dict(ask.chat)
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        if ask.max_tokens is not None:
            body.pop("max_completion_tokens", None)
            body["max_tokens"] = ask.max_tokens
        return body | ({"ignore_eos": True} if ask.runs_full else {})


class GrpcTarget:
    """k2dist's own API, read by its own client."""

    def __init__(
        self, url: str, *, model: str, timeout_s: float, tls: ClientTls | None, api_key: str
    ) -> None:
        self.url = url
        self._tls, self._api_key = tls, api_key
        self._address = url.partition("://")[2].rstrip("/")
        self._model = model
        self._timeout_s = timeout_s
        self._client: AsyncClient | None = None

    async def __aenter__(self) -> Self:
        self._client = AsyncClient(self._address, tls=self._tls, api_key=self._api_key)
        try:
            await self._client.models()
        except BaseException:
            await self._client.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._client is not None
        await self._client.close()

    async def ask(self, ask: Ask, sample: Sample) -> None:
        assert self._client is not None
        try:
            async for event in self._client.generate(self._request(ask), timeout_s=self._timeout_s):
                match event:
                    case Delta() if event.token_ids:
                        sample.note(time.perf_counter())
                    case Finished():
                        sample.prompt_tokens = event.usage.prompt_tokens
                        sample.completion_tokens += event.usage.completion_tokens
                    case Failed():
                        sample.error = event.message[:_MAX_ERROR_CHARS]
        except K2Error as error:
            sample.error = str(error)[:_MAX_ERROR_CHARS]

    def _request(self, ask: Ask) -> ClientRequest:
        if ask.chat is None:
            sampling = PartialSampling(max_tokens=ask.max_tokens, ignore_eos=ask.runs_full or None)
            return ClientRequest(prompt=ask.token_ids, sampling=sampling, model=self._model)
        given = {name: value for name, value in ask.chat.items() if name not in ("stream", "stream_options")}
        (request,) = read_chat_body(given, "").requests
        sampling = request.sampling
        if ask.max_tokens is not None:
            sampling = replace(sampling, max_tokens=ask.max_tokens)
        return replace(request, sampling=sampling, request_id=None, model=self._model)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def brings_something(self) -> bool:
        delta = self.delta or _Delta()
        return bool(self.text or delta.content or delta.reasoning_content or delta.tool_calls)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


async def _read_stream(response: aiohttp.ClientResponse, sample: Sample) -> None:
    is_done = False
    async for data in _sse_data(response):
        if data == _DONE:
            is_done = True
            continue
        try:
            chunk = _chunk.decode(data)
        except msgspec.DecodeError as error:
            sample.error = f"a chunk that is none: {error}"[:_MAX_ERROR_CHARS]
            return
        if chunk.error is not None:
            sample.error = str(chunk.error)[:_MAX_ERROR_CHARS]
        if any(choice.brings_something for choice in chunk.choices):
            sample.note(time.perf_counter())
        if chunk.usage is not None:
            sample.prompt_tokens = chunk.usage.prompt_tokens
            sample.completion_tokens = chunk.usage.completion_tokens
    if not is_done and not sample.error:
        sample.error = "the stream broke off before [DONE]"


async def _sse_data(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event: our servers, and all known ones, write a line of it."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _said(status: int, body: bytes) -> str:
    """A refusal in few words: OpenAI's message where there is one."""
    try:
        said = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, LookupError, TypeError):
        said = body.decode(errors="replace")
    return f"HTTP {status}: {said}"[:_MAX_ERROR_CHARS]
