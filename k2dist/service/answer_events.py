"""What a client reads: the events of one request's answer, in no API's words.

    Accepted, then Delta ... of all outputs as they come; the last of each output is Finished or Failed
    (PromptLogprobs ..., if asked for, before the deltas of output 0)

Positions are (output_index, token index); deltas are never cumulative.
"""

from __future__ import annotations

import enum

from k2dist.messages import Message, Sampling, TokenLogprob, Usage


class AnswerEnd(enum.StrEnum):
    """Why an output ended."""

    STOP = "stop"  # an end token, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    TOOL_CALLS = "tool_calls"  # stopped, having written at least one tool call
    ABORTED = "aborted"  # by the client or an operator
    TIMEOUT = "timeout"  # the request's `timeout_s` has passed


class Accepted(Message, frozen=True, kw_only=True):
    """A lane has the request: it is not lost from here on. `sampling` is resolved, its seed included."""

    request_id: str
    model: str
    prompt_tokens: int
    num_outputs: int
    sampling: Sampling
    lane: int


class PromptLogprobs(Message, frozen=True, kw_only=True):
    """Of the prompt's tokens from number `first_index` (at least 1) on; gapless, as deltas are."""

    first_index: int
    logprobs: tuple[TokenLogprob, ...]


class ToolCallDelta(Message, frozen=True, kw_only=True):
    """What the answer adds to its call number `index`; `id` and `name` come with the call's first delta."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Delta(Message, frozen=True, kw_only=True):
    """Tokens [first_index, first_index + len(token_ids)) and what they add; the text may lag behind."""

    output_index: int
    first_index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Finished(Message, frozen=True, kw_only=True):
    """The last event of an output that ended as asked."""

    output_index: int
    reason: AnswerEnd
    stop_match: str | int | None = None
    usage: Usage


class Failed(Message, frozen=True, kw_only=True):
    """The last event of an output that could not be finished. `reason` as listed in inference.proto."""

    output_index: int
    reason: str
    message: str
    retryable: bool


AnswerEvent = Accepted | PromptLogprobs | Delta | Finished | Failed
