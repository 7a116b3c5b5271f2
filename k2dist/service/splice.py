"""An answer that is read again from its beginning, less what its reader has had: for streams that broke off.

    had:    Accepted  "The ca" "pital "        ┊ connection lost
    again:  Accepted  "The" " capit" "al is"   ┊  ──push──>  "is" ...

Deltas may be cut differently the second time, and text may come with other tokens; so tokens, characters and
the arguments of each call are counted each for themselves. Pure.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from msgspec.structs import replace

from k2dist.service.answer_events import (
    Accepted,
    AnswerEvent,
    Delta,
    Failed,
    Finished,
    PromptLogprobs,
    ToolCallDelta,
)


@dataclass(slots=True)
class _Had:
    """Of one output. `num_calls`: those that have begun."""

    num_tokens: int = 0
    num_chars: int = 0
    num_calls: int = 0
    arguments: Counter[int] = field(default_factory=Counter)  # characters, by call
    has_ended: bool = False


class Splice:
    """`push` every event of the first stream, `again` when another begins, `push` that one's too."""

    def __init__(self) -> None:
        self.accepted: Accepted | None = None
        self._had: dict[int, _Had] = {}
        self._seen: dict[int, _Had] = {}  # of the stream that is read now
        self._num_prompt_logprobs = 0

    def again(self) -> None:
        """The next event is the first of the same answer, from its beginning."""
        self._seen = {}

    @property
    def has_ended(self) -> bool:
        """Every output's last event has been given."""
        return self.accepted is not None and (
            sum(had.has_ended for had in self._had.values()) == self.accepted.num_outputs
        )

    def push(self, event: AnswerEvent) -> AnswerEvent | None:
        """What is new in it; None if nothing is."""
        match event:
            case Accepted():
                is_new, self.accepted = self.accepted is None, self.accepted or event
                return event if is_new else None
            case PromptLogprobs(first_index=first_index, logprobs=logprobs):
                fresh = logprobs[max(self._num_prompt_logprobs + 1 - first_index, 0) :]
                self._num_prompt_logprobs += len(fresh)
                first_index += len(logprobs) - len(fresh)
                return replace(event, first_index=first_index, logprobs=fresh) if fresh else None
            case Delta():
                return self._delta(event)
            case Finished() | Failed():
                had = self._had.setdefault(event.output_index, _Had())
                is_new, had.has_ended = not had.has_ended, True
                return event if is_new else None

    def _delta(self, delta: Delta) -> Delta | None:
        had = self._had.setdefault(delta.output_index, _Had())
        seen = self._seen.setdefault(delta.output_index, _Had())
        skip = max(had.num_tokens - delta.first_index, 0)
        token_ids = delta.token_ids[skip:]
        text = delta.text[max(had.num_chars - seen.num_chars, 0) :]
        calls = tuple(
            fresh for call in delta.tool_calls if (fresh := _fresh_call(call, had, seen)) is not None
        )
        seen.num_chars += len(delta.text)
        had.num_tokens = max(had.num_tokens, delta.first_index + len(delta.token_ids))
        had.num_chars = max(had.num_chars, seen.num_chars)
        if not token_ids and not text and not calls:
            return None
        return replace(
            delta,
            first_index=delta.first_index + min(skip, len(delta.token_ids)),
            token_ids=token_ids,
            text=text,
            tool_calls=calls,
            # One for each token, or none; those without are the first.
            logprobs=delta.logprobs[max(skip - (len(delta.token_ids) - len(delta.logprobs)), 0) :],
        )


def _fresh_call(call: ToolCallDelta, had: _Had, seen: _Had) -> ToolCallDelta | None:
    """Calls begin in the order of their indices."""
    index, is_begun = call.index, call.index < had.num_calls
    arguments = call.arguments[max(had.arguments[index] - seen.arguments[index], 0) :]
    seen.arguments[index] += len(call.arguments)
    had.arguments[index] = max(had.arguments[index], seen.arguments[index])
    had.num_calls = max(had.num_calls, index + 1)
    if is_begun and not arguments:
        return None
    return ToolCallDelta(
        index=index,
        id=None if is_begun else call.id,
        name=None if is_begun else call.name,
        arguments=arguments,
    )
