"""OpenAI's requests as calls of the coordinator: what `http_exchange` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k2dist.errors import K2Error
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, Position
from k2dist.service.http_errors import ErrorReply, openai_error, rename_field
from k2dist.service.http_exchange import Events
from k2dist.service.http_metrics import AnswerClock
from k2dist.service.openai_answers import OpenAIStream, OpenAIWhole
from k2dist.service.openai_logprobs import Echo
from k2dist.service.openai_requests import CHAT_FIELDS, COMPLETION_FIELDS, OpenAIAsked
from k2dist.service.sse import DONE, Frame, Numbering, Place


class OpenAICall:
    """`places`: where a broken stream is read on, if this is to go on with one."""

    def __init__(
        self,
        client: AsyncClient,
        asked: OpenAIAsked,
        request_id: str,
        clock: AnswerClock,
        places: Mapping[int, Place] | None,
    ) -> None:
        self.clock = clock
        self.is_streamed = asked.is_streamed
        self._client = client
        self._asked = asked
        self._request_id = request_id
        self._places = places
        self._echoes: list[Echo] = []

    async def open(self) -> Sequence[Events]:
        requests = self._asked.requests
        if self._asked.echoes:
            self._echoes = [await self._echo(request) for request in requests]
        if self._places is None:
            return [
                self._client.generate(request, traceparent=self.clock.traceparent) for request in requests
            ]
        return [
            self._client.resume(request.request_id or "", self._positions(index))
            for index, request in enumerate(requests)
        ]

    def stream_writer(self) -> tuple[OpenAIStream, Numbering]:
        places = self._places or {}
        writer = OpenAIStream(
            self._asked, self._request_id, self._client.spelling, echoes=self._echoes, places=places
        )
        return writer, Numbering(self._request_id, places)

    def whole_writer(self) -> OpenAIWhole:
        return OpenAIWhole(self._asked, self._request_id, self._client.spelling, echoes=self._echoes)

    def end_of_stream(self) -> bytes:
        return DONE

    def error_frame(self, body: dict[str, Any]) -> Frame:
        return Frame(body)

    def refusal(self, error: K2Error) -> ErrorReply:
        names = CHAT_FIELDS if self._asked.is_chat else COMPLETION_FIELDS
        return openai_error(rename_field(error, names), self._request_id)

    def _positions(self, prompt_index: int) -> list[Position]:
        """Of one prompt's outputs; choices are numbered over all prompts."""
        assert self._places is not None
        num_outputs = self._asked.num_outputs
        first = prompt_index * num_outputs
        return [
            Position(output_index=index - first, token_index=place.token)
            for index, place in self._places.items()
            if first <= index < first + num_outputs
        ]

    async def _echo(self, request: ClientRequest) -> Echo:
        prompt = request.prompt
        if isinstance(prompt, str) and not self._asked.shows_logprobs:
            return Echo(prompt)
        assert isinstance(prompt, str | tuple), "completions have no conversations"
        ids = await self._client.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        text = prompt if isinstance(prompt, str) else (await self._client.detokenize(ids))
        return Echo(text, await self._client.token_bytes(ids[:1]))
