"""Anthropic's requests as calls of the coordinator: what `http_exchange` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k2dist.errors import K2Error
from k2dist.service.anthropic_answers import AnthropicStream, AnthropicWhole
from k2dist.service.anthropic_requests import FIELDS, AnthropicAsked
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import Chat, Position
from k2dist.service.http_errors import ErrorReply, anthropic_error, rename_field
from k2dist.service.http_exchange import Events
from k2dist.service.http_metrics import AnswerClock
from k2dist.service.sse import Frame, Numbering, Place


class AnthropicCall:
    """`places`: where a broken stream is read on, if this is to go on with one."""

    def __init__(
        self,
        client: AsyncClient,
        asked: AnthropicAsked,
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

    async def open(self) -> Sequence[Events]:
        if self._places is None:
            request, parent = self._asked.request, self.clock.traceparent
            return [self._client.generate(request, traceparent=parent)]
        position = Position(output_index=0, token_index=self._place.token)
        return [self._client.resume(self._request_id, [position])]

    def stream_writer(self) -> tuple[AnthropicStream, Numbering]:
        writer = AnthropicStream(self._request_id, self._place.state)
        return writer, Numbering(self._request_id, self._places or {})

    def whole_writer(self) -> AnthropicWhole:
        return AnthropicWhole(self._request_id)

    def end_of_stream(self) -> bytes:
        return b""

    def error_frame(self, body: dict[str, Any]) -> Frame:
        return Frame(body, "error")

    def refusal(self, error: K2Error) -> ErrorReply:
        return anthropic_error(rename_field(error, FIELDS), self._request_id)

    @property
    def _place(self) -> Place:
        return (self._places or {}).get(0, Place())


async def count_tokens(client: AsyncClient, chat: Chat) -> int:
    """Of the prompt that this conversation would make."""
    try:
        rendered = await client.apply_chat_template(chat)
    except K2Error as error:
        raise rename_field(error, FIELDS) from error
    return len(rendered.token_ids)
