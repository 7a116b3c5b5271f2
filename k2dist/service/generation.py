"""Text in, text and tool calls out: what gRPC serves now and HTTP will.

    ClientRequest ── template, tokenizer (threads) ──> Request ──> Coordinator
    AnswerEvent  <── Answer, one per output  <── Event  <── Reader

Errors before `Accepted` are raised; after it each output ends with one Finished or Failed.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from msgspec.structs import replace

from k2dist.errors import RequestError
from k2dist.grammar import answer_constraint
from k2dist.ids import RequestId
from k2dist.messages import Message, Request
from k2dist.scheduler import resolve_sampling
from k2dist.service.answer import Answer
from k2dist.service.answer_events import Accepted, AnswerEvent
from k2dist.service.auth import Caller, Gate
from k2dist.service.client_request import Chat, ClientRequest, Position
from k2dist.service.coordinator import AbortOutcome, Coordinator
from k2dist.service.encoding import Encoder
from k2dist.service.error_codes import RequestIdInUseError
from k2dist.service.owned_ids import inner_id, outer_id
from k2dist.service.served_model import ServedModel
from k2dist.service.submission import Reader
from k2dist.text.tokenizer import Tokenizer

MAX_OUTPUTS = 128
MAX_ID_LENGTH = 128


class AnswerStyle(Message, frozen=True, kw_only=True):
    """How to read a request's tokens as text, and what it was made of; kept with the request for Resume."""

    asked: ClientRequest
    first_call: int = 0

    @property
    def tools(self) -> tuple[dict[str, Any], ...] | None:
        """None: special tokens are dropped and nothing is taken for a tool call."""
        prompt = self.asked.prompt
        return prompt.tools if isinstance(prompt, Chat) and prompt.tools else None


class Generation:
    """See the module. One per coordinator; every method may run many times at once.

    draw_id: an id for a request that came without one, which names this coordinator.
    """

    def __init__(
        self,
        model: ServedModel,
        tokenizer: Tokenizer,
        encoder: Encoder,
        coordinator: Coordinator[AnswerStyle],
        gate: Gate,
        draw_id: Callable[[], str],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._encoder = encoder
        self._coordinator = coordinator
        self._gate = gate
        self._draw_id = draw_id

    async def generate(
        self, asked: ClientRequest, caller: Caller, *, traceparent: str = ""
    ) -> AsyncGenerator[AnswerEvent]:
        """The answer as it comes. Closing the generator leaves the request, which ends it unless detached.

        `traceparent`: W3C's, of the span that asks, or "".
        """
        self._check(asked)
        reader = await self._open(caller.own(asked), caller, traceparent)
        try:
            async for event in self._read(reader):
                yield event
        finally:
            reader.close()

    async def resume(
        self, request_id: str, positions: Sequence[Position], caller: Caller
    ) -> AsyncGenerator[AnswerEvent]:
        """The same answer again, each output from its position on; UnknownRequestError if it is forgotten, or
        was asked for by another."""
        reader = self._coordinator.attach(inner_id(caller.key_id, request_id))
        try:
            async for event in self._read(reader, _starts(positions, reader.request)):
                yield event
        finally:
            reader.close()

    async def abort(self, request_id: str, caller: Caller) -> AbortOutcome:
        return await self._coordinator.abort(inner_id(caller.key_id, request_id))

    async def tokenize(self, text: str, caller: Caller, *, allow_special: bool) -> list[int]:
        self._gate.admit(caller)
        return await self._encoder.encode_text(text, allow_special=allow_special)

    async def apply_template(
        self, chat: Chat, caller: Caller, *, add_generation_prompt: bool
    ) -> tuple[list[int], str]:
        """Token ids, and the same for people to read."""
        self._gate.admit(caller)
        return await self._encoder.render(chat, add_generation_prompt=add_generation_prompt)

    def check_model(self, name: str) -> None:
        if name not in ("", self.model.name):
            raise RequestError(
                "model", f"{name!r} is not served here; use {self.model.name!r} or leave it empty"
            )

    async def _open(self, asked: ClientRequest, caller: Caller, traceparent: str) -> Reader[AnswerStyle]:
        """A reader of the request: a known one with the same content, or a new one."""
        request_id = inner_id(caller.key_id, asked.request_id or self._draw_id())
        known, account = self._coordinator.find(request_id), None
        if known is None:
            account = self._gate.admit(caller)
            prompt = await self._encode(asked)
            request = self._request(asked, request_id, prompt)
            if request.sampling.constraint is not None:
                await self._encoder.check_constraint(request.sampling.constraint)
            known = self._coordinator.find(request.request_id)  # a twin may have come while we encoded
        if known is None:
            first_call = asked.prompt.num_calls if isinstance(asked.prompt, Chat) else 0
            style = AnswerStyle(asked=asked, first_call=first_call)
            self._answer(request, style)  # raises for tools that it cannot read, while there is time
            return self._coordinator.open(
                request, style, is_detached=asked.detached, account=account, traceparent=traceparent
            )
        if known.asked != asked:
            raise RequestIdInUseError(
                "request_id",
                f"{asked.request_id} belongs to another request; choose another id, best a UUID4",
            )
        return self._coordinator.attach(request_id)

    async def _encode(self, asked: ClientRequest) -> tuple[int, ...]:
        match asked.prompt:
            case str(text):
                return tuple(await self._encoder.encode_text(text))
            case Chat() as chat:
                return tuple(await self._encoder.encode_chat(chat))
            case token_ids:
                return token_ids

    def _request(self, asked: ClientRequest, request_id: RequestId, prompt: tuple[int, ...]) -> Request:
        if not prompt:
            raise RequestError("prompt", "empty; give at least one token")
        outside = next(
            (i for i, token_id in enumerate(prompt) if not 0 <= token_id < self.model.vocab_size), None
        )
        if outside is not None:
            last = self.model.vocab_size - 1
            raise RequestError(f"token_ids.ids[{outside}]", f"{prompt[outside]} is outside 0..{last}")
        sampling = resolve_sampling(
            replace(asked.sampling, constraint=answer_constraint(asked.prompt, asked.sampling.constraint)),
            self.model.defaults,
            prompt_tokens=len(prompt),
            max_positions=self.model.max_positions,
            holder=self.model.holder,
            vocab_size=self.model.vocab_size,
            draw_seed=lambda: secrets.randbits(64),
        )
        return Request(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            num_outputs=asked.num_outputs,
            tenant=asked.tenant,
            priority=asked.priority,
            timeout_s=asked.timeout_s,
        )

    async def _read(
        self, reader: Reader[AnswerStyle], starts: Sequence[int] = ()
    ) -> AsyncGenerator[AnswerEvent]:
        lane = await reader.accepted()
        request, style = reader.request, reader.note
        answers = [self._answer(request, style) for _ in range(request.num_outputs)]
        for output_index, start in enumerate(starts):
            if start > 0:
                answers[output_index].push(reader.skip(output_index, start))
        yield Accepted(
            request_id=outer_id(request.request_id),
            model=self.model.name,
            prompt_tokens=len(request.prompt),
            num_outputs=request.num_outputs,
            sampling=request.sampling,
            lane=lane,
        )
        async for event in reader:
            for shown in answers[event.output_index].push(event):
                yield shown

    def _answer(self, request: Request, style: AnswerStyle) -> Answer:
        return Answer(
            self.tokenizer,
            stops=request.sampling.stop,
            min_tokens=request.sampling.min_tokens,
            tools=style.tools,
            first_call=style.first_call,
        )

    def _check(self, asked: ClientRequest) -> None:
        self.check_model(asked.model)
        if not 1 <= asked.num_outputs <= MAX_OUTPUTS:
            raise RequestError("num_outputs", f"{asked.num_outputs} is outside 1..{MAX_OUTPUTS}")
        request_id = asked.request_id
        if request_id is None:
            return
        is_printable = request_id.isascii() and request_id.isprintable()
        if not 1 <= len(request_id) <= MAX_ID_LENGTH or not is_printable:
            raise RequestError(
                "request_id", f"use 1 to {MAX_ID_LENGTH} printable ASCII characters, or leave it out"
            )


def _starts(positions: Sequence[Position], request: Request) -> list[int]:
    """First token to read, by output; 0 for those not named."""
    starts = [0] * request.num_outputs
    for index, position in enumerate(positions):
        if position.output_index >= request.num_outputs:
            raise RequestError(
                f"from[{index}].output_index",
                f"{position.output_index}; the request has {request.num_outputs}",
            )
        starts[position.output_index] = position.token_index
    return starts
