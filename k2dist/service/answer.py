"""One output of a request, from a lane's token events to text and tool calls.

    token ids -> OutputReader (text, tool calls) -> Delta ... Finished or Failed

The lane decides when an output ends; this only decides what of it is text. Pure and restartable: fed the
same tokens again, however cut, it gives the same text, which is how Resume replays from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from k2dist.messages import Event, FinishReason, Usage
from k2dist.service.answer_events import (
    AnswerEnd,
    Delta,
    Failed,
    Finished,
    PromptLogprobs,
    ToolCallDelta,
)
from k2dist.text.output import OutputReader
from k2dist.text.tokenizer import Tokenizer
from k2dist.text.tool_calls import ArgumentsDelta, CallEnded, CallStarted, ContentDelta, Part

# Most tokens of one event: with 20 rivals each about 4 MB of a gRPC message's 16. A slow reader, or Resume,
# may have 100,000 to read at once.
PIECE_TOKENS = 4096

OutputEvent = PromptLogprobs | Delta | Finished | Failed

_ENDS = {
    FinishReason.STOP: AnswerEnd.STOP,
    FinishReason.LENGTH: AnswerEnd.LENGTH,
    FinishReason.ABORT: AnswerEnd.ABORTED,
    FinishReason.TIMEOUT: AnswerEnd.TIMEOUT,
}


class Answer:
    """Reads the lane's events of one output, in order, and gives what a client is to see of each.

    The options are those of `OutputReader`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: tuple[str, ...] = (),
        min_tokens: int = 0,
        tools: tuple[dict[str, Any], ...] | None = None,
        first_call: int = 0,
    ) -> None:
        self._reader = OutputReader(
            tokenizer, stops=stops, min_tokens=min_tokens, tools=tools, first_call=first_call
        )

    def push(self, event: Event) -> tuple[OutputEvent, ...]:
        """Logprobs of the prompt and deltas, as far as there is anything to show, and the terminal event if
        this was the output's last."""
        events: list[OutputEvent] = []
        events += _prompt_logprobs(event)
        events += (_delta(piece, self._reader.push(piece.token_ids)) for piece in _pieces(event))
        if event.finish is not None:
            is_cut = event.finish is not FinishReason.STOP or isinstance(event.stop_match, str)
            events += _tail(event, self._reader.finish(is_cut=is_cut))
        if event.finish is FinishReason.ERROR:
            events.append(_failed(event))
        elif event.finish is not None:
            events.append(self._finished(event, _ENDS[event.finish]))
        return tuple(events)

    def _finished(self, event: Event, end: AnswerEnd) -> Finished:
        if end is AnswerEnd.STOP and self._reader.num_calls > 0:
            end = AnswerEnd.TOOL_CALLS
        return Finished(
            output_index=event.output_index,
            reason=end,
            stop_match=event.stop_match,
            usage=event.usage or Usage(completion_tokens=event.first_index + len(event.token_ids)),
        )


def _prompt_logprobs(event: Event) -> Iterator[PromptLogprobs]:
    for start in range(0, len(event.prompt_logprobs), PIECE_TOKENS):
        yield PromptLogprobs(
            first_index=event.first_prompt_index + start,
            logprobs=event.prompt_logprobs[start : start + PIECE_TOKENS],
        )


def _pieces(event: Event) -> Iterator[Event]:
    """The event's tokens, a bounded number at a time; each piece is read by itself, so that an answer can be
    resumed behind any of them."""
    num_tokens = len(event.token_ids)
    if 0 < num_tokens <= PIECE_TOKENS:
        yield event
        return
    num_bare = num_tokens - len(event.logprobs)  # known before the lane had it, and first in the event
    for start in range(0, num_tokens, PIECE_TOKENS):
        stop = start + PIECE_TOKENS
        yield Event(
            request_id=event.request_id,
            output_index=event.output_index,
            first_index=event.first_index + start,
            token_ids=event.token_ids[start:stop],
            logprobs=event.logprobs[max(start - num_bare, 0) : max(stop - num_bare, 0)],
        )


def _tail(event: Event, parts: tuple[Part, ...]) -> Iterator[Delta]:
    """What was held back to the end. Without tokens, and so told from what the last tokens gave: who resumes
    behind these gets it again."""
    if parts:
        end = Event(
            request_id=event.request_id,
            output_index=event.output_index,
            first_index=event.first_index + len(event.token_ids),
        )
        tail = _delta(end, parts)
        if tail.text or tail.tool_calls:
            yield tail


def _delta(event: Event, parts: tuple[Part, ...]) -> Delta:
    text = ""
    calls: dict[int, ToolCallDelta] = {}
    for part in parts:
        match part:
            case ContentDelta(more):
                text += more
            case CallStarted(index, call_id, name):
                calls[index] = ToolCallDelta(index=index, id=call_id, name=name)
            case ArgumentsDelta(index, more):
                known = calls.get(index, ToolCallDelta(index=index))
                arguments = known.arguments + more
                calls[index] = ToolCallDelta(index=index, id=known.id, name=known.name, arguments=arguments)
            case CallEnded():
                pass
    return Delta(
        output_index=event.output_index,
        first_index=event.first_index,
        token_ids=event.token_ids,
        text=text,
        tool_calls=tuple(calls.values()),
        logprobs=event.logprobs,
    )


def _failed(event: Event) -> Failed:
    return Failed(
        output_index=event.output_index,
        reason="RANK_LOST" if event.retry_can_help else "INTERNAL",
        message=event.error,
        retryable=event.retry_can_help,
    )
