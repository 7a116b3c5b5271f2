"""An answer's events in Anthropic's words: the events of a stream, or one whole message. Pure.

    message_start
    content_block_start, [ping,] content_block_delta ..., content_block_stop      for each block
    message_delta, message_stop

Text is a block and each tool call is one. Fed from wherever an answer is to be read on, with the block that
is open there, a stream's events put together are the whole message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from k2dist.errors import RequestError
from k2dist.messages import ToolCall, Usage
from k2dist.service.answer_events import (
    Accepted,
    AnswerEnd,
    AnswerEvent,
    Delta,
    Finished,
    ToolCallDelta,
)
from k2dist.service.sse import Frame, Step
from k2dist.service.whole_answer import WholeAnswer

_STOP = {
    AnswerEnd.STOP: "end_turn",
    AnswerEnd.LENGTH: "max_tokens",
    AnswerEnd.TOOL_CALLS: "tool_use",
    AnswerEnd.TIMEOUT: "max_tokens",
    AnswerEnd.ABORTED: "end_turn",  # not met: whoever reads the events turns it into an error
}


class AnthropicStream:
    """Events of one message. `state`: `Step.state_after` of where it is read on; "" at its beginning."""

    def __init__(self, request_id: str, state: str = "") -> None:
        self._request_id = request_id
        self._index, self._open = _read_state(state)  # of the block that is open, or the next; its kind

    def push(self, prompt_index: int, event: AnswerEvent) -> Iterator[Step]:
        match event:
            case Accepted():
                message = _message(self._request_id, event.model, [], None, None)
                message["usage"] = _usage(Usage(prompt_tokens=event.prompt_tokens))
                frame = _frame("message_start", message=message)
                yield Step(0, [frame], is_opening=True)
            case Delta():
                yield self._delta(event)
            case Finished():
                yield Step(0, [*self._close(), *_end(event)])
            case _:
                pass

    def _delta(self, delta: Delta) -> Step:
        frames: list[Frame] = []
        if delta.text:
            frames += self._begin("t", {"type": "text", "text": ""}) if self._open != "t" else ()
            frames.append(self._piece("text_delta", "text", delta.text))
        for call in delta.tool_calls:
            frames += self._call(call)
        num_tokens = len(delta.token_ids)
        return Step(
            0,
            frames,
            token_after=delta.first_index + num_tokens if num_tokens else None,
            state_after=f"{self._index}{self._open}",
        )

    def _call(self, call: ToolCallDelta) -> Iterator[Frame]:
        if call.id is not None:
            block = {"type": "tool_use", "id": call.id, "name": call.name or "", "input": {}}
            yield from self._begin("u", block)
        if call.arguments:
            yield self._piece("input_json_delta", "partial_json", call.arguments)

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[Frame]:
        yield from self._close()
        self._open = kind
        yield _frame("content_block_start", index=self._index, content_block=block)
        if self._index == 0:
            yield _frame("ping")

    def _piece(self, kind: str, name: str, text: str) -> Frame:
        frame = _frame("content_block_delta", index=self._index, delta={"type": kind, name: text})
        return frame._replace(piece=("delta", name))

    def _close(self) -> Iterator[Frame]:
        if self._open != "n":
            yield _frame("content_block_stop", index=self._index)
            self._index += 1
            self._open = "n"


class AnthropicWhole:
    """One message in whole: `push` everything, then `response`."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._answer = WholeAnswer()

    def push(self, prompt_index: int, event: AnswerEvent) -> None:
        self._answer.add(event)

    def response(self) -> dict[str, Any]:
        answer = self._answer
        assert answer.accepted is not None, "events are pushed from the first"
        assert answer.finished is not None, "events are pushed to the last"
        blocks: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        blocks += map(_tool_use, answer.tool_calls)
        reason, sequence = _stop(answer.finished)
        message = _message(self._request_id, answer.accepted.model, blocks, reason, sequence)
        return message | {"usage": _usage(answer.finished.usage)}


def _end(finished: Finished) -> Iterator[Frame]:
    reason, sequence = _stop(finished)
    ended = {"stop_reason": reason, "stop_sequence": sequence}
    yield _frame("message_delta", delta=ended, usage=_usage(finished.usage))
    yield _frame("message_stop")


def _stop(finished: Finished) -> tuple[str, str | None]:
    if finished.reason is AnswerEnd.STOP and isinstance(finished.stop_match, str):
        return "stop_sequence", finished.stop_match
    return _STOP[finished.reason], None


def _message(
    request_id: str, model: str, blocks: list[dict[str, Any]], reason: str | None, sequence: str | None
) -> dict[str, Any]:
    return {
        "id": request_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": reason,
        "stop_sequence": sequence,
    }


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}


def _input(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as an object. Where they were cut off, what is whole of them, as the official client
    reads a stream that was cut; {} where they are none."""
    try:
        value = from_json(arguments, allow_partial=True) if isinstance(arguments, str) else arguments
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> dict[str, Any]:
    """What came from the cache is counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _frame(kind: str, **fields: Any) -> Frame:
    return Frame({"type": kind} | fields, kind)


def _read_state(state: str) -> tuple[int, str]:
    index, kind = state[:-1] or "0", state[-1:] or "n"
    if not index.isascii() or not index.isdigit() or kind not in "ntu":
        raise RequestError("Last-Event-ID", "not an id that this server gave")
    return int(index), kind
