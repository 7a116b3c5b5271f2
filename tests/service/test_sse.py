"""Resuming, without a server: however the tokens are cut, nothing is lost and nothing doubled.

An answer is generated from chosen tokens and cut into deltas at random; its events are read up to each place;
from there the same answer, cut at random again, is read on by what `Last-Event-ID` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.errors import RequestError
from k2dist.messages import Event, FinishReason, Sampling, TokenLogprob, Usage
from k2dist.service.answer import Answer
from k2dist.service.answer_events import Accepted, AnswerEvent
from k2dist.service.anthropic_answers import AnthropicStream
from k2dist.service.client_request import Chat, ClientRequest
from k2dist.service.openai_answers import OpenAIStream
from k2dist.service.openai_logprobs import Echo
from k2dist.service.openai_requests import OpenAIAsked
from k2dist.service.sse import DONE, Numbering, Place, read_id, write_id
from k2dist.text.tokenizer import IM_END, Tokenizer
from tests.service.http_clients import WEATHER, SseEvent, join_anthropic, join_openai, two_calls

CHAT_ID = "chatcmpl-6929a1f23c1f9be04d7a2e559f0c2b71"
TEXT_ID = CHAT_ID.replace("chatcmpl", "cmpl")
MESSAGE_ID = CHAT_ID.replace("chatcmpl-", "msg_")
SPELLING = {token: bytes((token,)) for token in range(256)} | dict.fromkeys(range(256, 512), b"<special>")
ACCEPTED = partial(Accepted, model="tiny", prompt_tokens=2, sampling=Sampling(), lane=0)

Places = dict[int, Place]
Read = Callable[[Sequence[Sequence[int]], Places], Iterator[bytes]]


def answers_of(
    tokenizer: Tokenizer, tokens: Sequence[int], cuts: Sequence[int], start: int, stops: tuple[str, ...] = ()
) -> Iterator[AnswerEvent]:
    """Output 0 from token `start` on, in deltas that end at `cuts`, as the coordinator would give it."""
    answer = Answer(tokenizer, stops=stops, tools=(WEATHER,))
    if start > 0:
        answer.push(_event(tokens, 0, start))
    ends = [*sorted(cut for cut in set(cuts) if start < cut < len(tokens)), len(tokens)]
    for begin, end in zip([start, *ends], ends, strict=False):
        if begin < end:
            yield from answer.push(_event(tokens, begin, end))
    usage = Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=len(tokens))
    last = Event(
        request_id=CHAT_ID,  # type: ignore[arg-type]
        output_index=0,
        first_index=len(tokens),
        finish=FinishReason.STOP,
        stop_match=tokenizer.special_id(IM_END),
        usage=usage,
    )
    yield from answer.push(last)


def _event(tokens: Sequence[int], begin: int, end: int) -> Event:
    logprobs = tuple(TokenLogprob(token_id=token, logprob=-1.0) for token in tokens[begin:end])
    return Event(
        request_id=CHAT_ID,  # type: ignore[arg-type]
        output_index=0,
        first_index=begin,
        token_ids=tuple(tokens[begin:end]),
        logprobs=logprobs,
    )


def parse(shown: bytes) -> SseEvent:
    fields = dict(line.split(": ", 1) for line in shown.decode().strip().split("\n"))
    return SseEvent(**fields)


def openai_events(
    tokenizer: Tokenizer, asked: OpenAIAsked, tokens: Sequence[int], cuts: Sequence[int], last_id: str | None
) -> list[SseEvent]:
    request_id, places = read_id(last_id) if last_id else (CHAT_ID if asked.is_chat else TEXT_ID, {})
    echoes = [Echo("né", b"n")] if asked.echoes else []
    writer = OpenAIStream(asked, request_id, SPELLING, echoes=echoes, places=places)
    numbering = Numbering(request_id, places)
    start = places.get(0, Place()).token
    events = [ACCEPTED(request_id=request_id, num_outputs=1), *answers_of(tokenizer, tokens, cuts, start)]
    shown = [frame for event in events for step in writer.push(0, event) for frame in numbering.push(step)]
    return [parse(frame) for frame in [*shown, DONE]]


def anthropic_events(
    tokenizer: Tokenizer, tokens: Sequence[int], cuts: Sequence[int], last_id: str | None
) -> list[SseEvent]:
    request_id, places = read_id(last_id) if last_id else (MESSAGE_ID, {})
    place = places.get(0, Place())
    writer = AnthropicStream(request_id, place.state)
    numbering = Numbering(request_id, places)
    events = [
        ACCEPTED(request_id=request_id, num_outputs=1),
        *answers_of(tokenizer, tokens, cuts, place.token),
    ]
    shown = [frame for event in events for step in writer.push(0, event) for frame in numbering.push(step)]
    return [parse(frame) for frame in shown]


def cuts_of() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 70), max_size=12)


def answers() -> st.SearchStrategy[str]:
    return st.sampled_from(
        ["I look.", "", "né 😀 <|tool_call_section_begin|", "<|tool_call_section_begin|>  "]
    )


def asked(**more: Any) -> OpenAIAsked:
    request = ClientRequest(prompt=Chat(messages=()))
    return OpenAIAsked(requests=(request,), is_streamed=True, **more)


@pytest.mark.parametrize(
    "form",
    [
        asked(is_chat=True, shows_usage=True),
        asked(is_chat=True, shows_logprobs=True),
        asked(is_chat=False, shows_usage=True),
        asked(is_chat=False, shows_logprobs=True),
        asked(is_chat=False, echoes=True),
    ],
    ids=["chat", "chat with logprobs", "text", "text with logprobs", "echo"],
)
@given(text=answers(), before=cuts_of(), after=cuts_of())
@settings(max_examples=40, deadline=None)
def test_an_openai_stream_goes_on_from_every_event(
    tokenizer: Tokenizer, form: OpenAIAsked, text: str, before: list[int], after: list[int]
) -> None:
    tokens = two_calls(tokenizer, text)
    events = openai_events(tokenizer, form, tokens, before, None)
    whole = join_openai(events)
    for num_seen in range(1, len(events)):
        seen = events[:num_seen]
        rest = openai_events(tokenizer, form, tokens, after, seen[-1].id)
        assert join_openai(seen + rest) == whole


@given(text=answers(), before=cuts_of(), after=cuts_of())
@settings(max_examples=100, deadline=None)
def test_an_anthropic_stream_goes_on_from_every_event(
    tokenizer: Tokenizer, text: str, before: list[int], after: list[int]
) -> None:
    tokens = two_calls(tokenizer, text)
    events = anthropic_events(tokenizer, tokens, before, None)
    whole = join_anthropic(events)
    for num_seen in range(1, len(events) + 1):
        seen = events[:num_seen]
        rest = anthropic_events(tokenizer, tokens, after, seen[-1].id)
        assert join_anthropic(seen + rest) == whole


@given(
    st.dictionaries(
        st.integers(0, 9999),
        st.builds(
            Place,
            st.integers(0, 10**9 - 1),
            st.integers(0, 10**9 - 1),
            st.sampled_from(["", "0", "12t", "3n"]),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_an_id_is_read_as_it_was_written(places: Places) -> None:
    assert read_id(write_id(CHAT_ID, places)) == (CHAT_ID, places)


@given(st.text())
def test_other_ids_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"^Last-Event-ID: not an id"):
        read_id(text)
