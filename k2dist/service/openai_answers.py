"""An answer's events in OpenAI's words: chunks of a stream, or one whole response. Pure.

Both kinds of body are written here; they differ in where the text stands and in the form of logprobs. Fed a
request's events from wherever its outputs are to be read on, a stream's chunks, put together, are the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k2dist.errors import RequestError
from k2dist.messages import TokenLogprob, Usage
from k2dist.service.answer_events import (
    Accepted,
    AnswerEnd,
    AnswerEvent,
    Delta,
    Failed,
    Finished,
    PromptLogprobs,
    ToolCallDelta,
)
from k2dist.service.openai_logprobs import Echo, EchoLogprobs, Spelling, chat_logprobs, completion_logprobs
from k2dist.service.openai_requests import OpenAIAsked
from k2dist.service.request_ids import created_of
from k2dist.service.sse import Frame, Place, Step
from k2dist.service.whole_answer import WholeAnswer

_FINISH = {
    AnswerEnd.STOP: "stop",
    AnswerEnd.LENGTH: "length",
    AnswerEnd.TOOL_CALLS: "tool_calls",
    AnswerEnd.TIMEOUT: "length",
    AnswerEnd.ABORTED: "stop",  # not met: whoever reads the events turns it into an error
}


class OpenAIStream:
    """Chunks of one response. `places`: where outputs are read on; `echoes`: of each prompt, if asked for."""

    def __init__(
        self,
        asked: OpenAIAsked,
        request_id: str,
        spelling: Spelling,
        *,
        echoes: Sequence[Echo] = (),
        places: Mapping[int, Place] | None = None,
    ) -> None:
        self._asked = asked
        self._writer = _Writer(asked, request_id, spelling)
        self._echoes = [EchoLogprobs(echo, is_scored=asked.shows_logprobs) for echo in echoes]
        self._waiting: list[tuple[int, AnswerEvent]] = []  # until the prompt's logprobs are there
        read_on = ((index, place) for index, place in (places or {}).items() if place.token > 0)
        self._offsets = {index: _read_offset(place.state) for index, place in read_on}
        self._usages = _Usages(asked)

    def push(self, prompt_index: int, event: AnswerEvent) -> Iterator[Step]:
        """What one event of the answer to one prompt adds."""
        if isinstance(event, Accepted):
            self._usages.accept(prompt_index, event)
            self._writer.model = event.model
        echo = self._echoes[prompt_index] if self._echoes else None
        if echo is None:
            yield from self._show(prompt_index, event, None)
            return
        echo.add(event)
        self._waiting.append((prompt_index, event))
        if echo.is_whole:
            ready = [entry for entry in self._waiting if entry[0] == prompt_index]
            self._waiting = [entry for entry in self._waiting if entry[0] != prompt_index]
            for _, waited in ready:
                yield from self._show(prompt_index, waited, echo)

    def _show(self, prompt_index: int, event: AnswerEvent, echo: EchoLogprobs | None) -> Iterator[Step]:
        first = prompt_index * self._asked.num_outputs
        match event:
            case Accepted():
                for index in range(first, first + event.num_outputs):
                    yield Step(index, self._opening(index, echo), is_opening=True)
            case Delta():
                yield self._delta(first + event.output_index, event)
            case Finished():
                index = first + event.output_index
                usage = self._usages.finish(prompt_index, event)
                yield Step(index, [self._writer.chunk(index, {}, finish=_FINISH[event.reason], usage=usage)])
                if self._asked.shows_usage and self._usages.is_whole:
                    yield Step(self._asked.num_choices, [self._writer.usage_chunk(self._usages.total())])
            case PromptLogprobs() | Failed():
                pass

    def _opening(self, index: int, echo: EchoLogprobs | None) -> list[Frame]:
        if self._asked.is_chat:
            return [self._writer.chunk(index, {"role": "assistant", "content": ""})]
        if echo is None:
            return []
        self._offsets.setdefault(index, len(echo.text))
        logprobs = echo.form(self._writer.spelling) if self._asked.shows_logprobs else None
        return [self._writer.chunk(index, {"text": echo.text}, logprobs=logprobs)]

    def _delta(self, index: int, delta: Delta) -> Step:
        logprobs = None
        if self._asked.shows_logprobs and delta.logprobs:
            offset = self._offsets.get(index, 0)
            logprobs, self._offsets[index] = self._writer.logprobs(delta.logprobs, offset)
        frames = []
        if delta.text or delta.tool_calls or logprobs is not None:
            shown = self._writer.content(delta.text, [_call_delta(call) for call in delta.tool_calls])
            frames.append(self._writer.chunk(index, shown, logprobs=logprobs))
        return Step(
            index,
            frames,
            token_after=delta.first_index + len(delta.token_ids) if delta.token_ids else None,
            state_after=str(self._offsets.get(index) or ""),
        )


class OpenAIWhole:
    """One response in whole: `push` everything, then `response`."""

    def __init__(
        self, asked: OpenAIAsked, request_id: str, spelling: Spelling, *, echoes: Sequence[Echo] = ()
    ) -> None:
        self._asked = asked
        self._writer = _Writer(asked, request_id, spelling)
        self._echoes = [EchoLogprobs(echo, is_scored=asked.shows_logprobs) for echo in echoes]
        self._answers = [WholeAnswer(index % asked.num_outputs) for index in range(asked.num_choices)]
        self._usages = _Usages(asked)

    def push(self, prompt_index: int, event: AnswerEvent) -> None:
        if isinstance(event, Accepted):
            self._usages.accept(prompt_index, event)
            self._writer.model = event.model
        elif isinstance(event, Finished):
            self._usages.finish(prompt_index, event)
        if self._echoes:
            self._echoes[prompt_index].add(event)
        first = prompt_index * self._asked.num_outputs
        for answer in self._answers[first : first + self._asked.num_outputs]:
            answer.add(event)

    def response(self) -> dict[str, Any]:
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        choices = [self._choice(index, answer) for index, answer in enumerate(self._answers)]
        return self._writer.head(kind) | {"choices": choices, "usage": self._usages.total()}

    def _choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        assert answer.finished is not None, "events are pushed to the last"
        choice: dict[str, Any] = {"index": index, "finish_reason": _FINISH[answer.finished.reason]}
        if self._asked.is_chat:
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.tool_calls
            ]
            message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else "")}
            choice["message"] = message | ({"tool_calls": calls} if calls else {})
        else:
            echo = self._echoes[index // self._asked.num_outputs] if self._echoes else None
            choice["text"] = (echo.text if echo else "") + answer.text
        choice["logprobs"] = self._logprobs(index, answer)
        return choice

    def _logprobs(self, index: int, answer: WholeAnswer) -> dict[str, Any] | None:
        if not self._asked.shows_logprobs:
            return None
        echo = self._echoes[index // self._asked.num_outputs] if self._echoes else None
        offset = len(echo.text) if echo else 0
        form, _ = self._writer.logprobs(answer.logprobs, offset)
        if echo is None:
            return form
        before = echo.form(self._writer.spelling)
        return {name: [*before[name], *form[name]] for name in form}


class _Writer:
    """The parts of which chunks and responses are made."""

    def __init__(self, asked: OpenAIAsked, request_id: str, spelling: Spelling) -> None:
        self.model = ""
        self.spelling = spelling
        self._asked = asked
        self._request_id = request_id
        self._created = created_of(request_id)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self._request_id, "object": kind, "created": self._created, "model": self.model}

    def chunk(
        self,
        index: int,
        shown: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> Frame:
        """One choice's chunk. `usage` of the choice goes with its end: K2-Vendor-Verifier reads it there."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if self._asked.is_chat:
            choice["delta"] = shown
        else:
            choice["text"] = shown.get("text", "")
        if finish is not None and self._asked.shows_usage:
            choice["usage"] = usage
        return Frame(self._head_of_chunk() | {"choices": [choice]})

    def usage_chunk(self, usage: dict[str, Any]) -> Frame:
        return Frame(self._head_of_chunk() | {"choices": [], "usage": usage})

    def content(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._asked.is_chat:
            return {"text": text}
        return ({"content": text} if text or not calls else {}) | ({"tool_calls": calls} if calls else {})

    def logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
        """The API's form; for completions also the place in the text after the last of these tokens."""
        if self._asked.is_chat:
            return chat_logprobs(logprobs, self.spelling), 0
        return completion_logprobs(logprobs, self.spelling, offset)

    def _head_of_chunk(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
        return self.head(kind) | ({"usage": None} if self._asked.shows_usage else {})


class _Usages:
    """Tokens of all choices: each prompt once, each answer."""

    def __init__(self, asked: OpenAIAsked) -> None:
        self._num_missing = asked.num_choices
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0

    @property
    def is_whole(self) -> bool:
        return self._num_missing == 0

    def accept(self, prompt_index: int, accepted: Accepted) -> None:
        self._prompt_tokens[prompt_index] = accepted.prompt_tokens

    def finish(self, prompt_index: int, finished: Finished) -> dict[str, Any]:
        """Usage of this choice alone."""
        self._num_missing -= 1
        usage = finished.usage
        if finished.output_index == 0:
            self._cached_tokens[prompt_index] = usage.cached_tokens
        self._completion_tokens += usage.completion_tokens
        return _usage(usage)

    def total(self) -> dict[str, Any]:
        return _usage(
            Usage(
                prompt_tokens=sum(self._prompt_tokens.values()),
                cached_tokens=sum(self._cached_tokens.values()),
                completion_tokens=self._completion_tokens,
            )
        )


def _read_offset(state: str) -> int:
    if state and not (state.isascii() and state.isdigit()):
        raise RequestError("Last-Event-ID", "not an id that this server gave")
    return int(state or "0")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """The name and the id come once, with the call's first piece."""
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name or ""} | function,
    }
