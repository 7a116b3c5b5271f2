"""Answers through the whole service: text, order, several at once, tool calls, logprobs."""

from __future__ import annotations

import asyncio
import string

from k2dist.messages import ChatMessage
from k2dist.scheduler import Limits
from k2dist.service.answer_events import Accepted, AnswerEnd, AnswerEvent, Delta, Finished, PromptLogprobs
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling, Position
from k2dist.service.whole_answer import WholeAnswer
from k2dist.text.tokenizer import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    IM_END,
    SECTION_BEGIN,
    SECTION_END,
    Tokenizer,
)
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane

HELLO = (ChatMessage(role="user", content="Hello"),)
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"properties": {"city": {}}}},
}


async def collect(client: AsyncClient, request: ClientRequest) -> list[AnswerEvent]:
    return [event async for event in client.generate(request)]


def text_of(events: list[AnswerEvent], output_index: int = 0) -> str:
    deltas = (event for event in events if isinstance(event, Delta))
    return "".join(delta.text for delta in deltas if delta.output_index == output_index)


def tokens_of(events: list[AnswerEvent], output_index: int = 0) -> list[int]:
    """Token ids of one output; asserts that the deltas leave no gap."""
    tokens: list[int] = []
    for event in events:
        if isinstance(event, Delta) and event.output_index == output_index:
            assert event.first_index == len(tokens)
            tokens += event.token_ids
    return tokens


async def test_a_conversation_is_answered_in_order(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, step_s=0.002)
    async with serve(lane) as client:
        events = [event async for event in client.chat(HELLO)]
    accepted, *deltas, finished = events
    assert isinstance(accepted, Accepted)
    assert accepted.model == "tiny"
    assert accepted.prompt_tokens > 0
    assert accepted.sampling.temperature == 0.25  # generation_config.json's
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert len(deltas) > 5  # streamed, not gathered
    assert text_of(events) == string.ascii_lowercase
    assert tokens_of(events) == [*string.ascii_lowercase.encode(), tokenizer.special_id(IM_END)]
    assert isinstance(finished, Finished)
    assert finished.reason is AnswerEnd.STOP
    assert finished.stop_match == tokenizer.special_id(IM_END)
    assert finished.usage.completion_tokens == 27
    assert finished.usage.prompt_tokens == accepted.prompt_tokens
    assert lane.num_pages_used == 0


async def test_text_and_token_ids_are_prompts_without_template(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        by_text = await collect(client, ClientRequest(prompt="<|im_end|>w"))
        by_ids = await collect(client, ClientRequest(prompt=(ord("v"),)))
    assert isinstance(by_text[0], Accepted)
    assert by_text[0].prompt_tokens == len("<|im_end|>w")  # a special's name in text is text
    assert text_of(by_text) == "xyz"
    assert text_of(by_ids) == "wxyz"


async def test_several_requests_stream_at_once(serve: Serve, tokenizer: Tokenizer) -> None:
    lanes = (FakeLane(tokenizer, lane=0, step_s=0.002), FakeLane(tokenizer, lane=1, step_s=0.002))
    async with serve(*lanes) as client:
        answers = await asyncio.gather(
            *(collect(client, ClientRequest(prompt=start)) for start in "abcdefghij")
        )
    for start, events in zip("abcdefghij", answers, strict=True):
        assert text_of(events) == string.ascii_lowercase[ord(start) - ord("a") + 1 :]
    used = {event.lane for events in answers for event in events if isinstance(event, Accepted)}
    assert used == {0, 1}


async def test_each_output_has_one_end(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        events = await collect(client, ClientRequest(prompt="v", num_outputs=3))
    ends = [event.output_index for event in events if isinstance(event, Finished)]
    assert sorted(ends) == [0, 1, 2]
    for output_index in range(3):
        assert text_of(events, output_index) == "wxyz"
        tokens_of(events, output_index)


async def test_max_tokens_cuts_with_length(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        events = await collect(client, ClientRequest(prompt="a", sampling=PartialSampling(max_tokens=3)))
    assert text_of(events) == "bcd"
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is AnswerEnd.LENGTH
    assert finished.stop_match is None


async def test_nothing_of_a_stop_string_is_shown(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        events = await collect(
            client, ClientRequest(prompt="a", sampling=PartialSampling(stop=("gh", "ijk")))
        )
    assert text_of(events) == "bcdef"
    assert bytes(tokens_of(events)) == b"bcdefgh"  # the tokens are all there
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is AnswerEnd.STOP
    assert finished.stop_match == "gh"


async def test_a_seed_is_drawn_and_told(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        given = await collect(client, ClientRequest(prompt="y", sampling=PartialSampling(seed=2**64 - 1)))
        drawn = [await collect(client, ClientRequest(prompt="y")) for _ in range(2)]
    seeds = [events[0].sampling.seed for events in (given, *drawn) if isinstance(events[0], Accepted)]
    assert seeds[0] == 2**64 - 1
    assert len(set(seeds)) == 3


async def test_zero_is_not_absence(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        sampling = PartialSampling(temperature=0.0, seed=0, top_k=0, logprobs=0)
        events = await collect(client, ClientRequest(prompt="x", sampling=sampling))
    accepted, delta = events[0], events[1]
    assert isinstance(accepted, Accepted)
    assert (accepted.sampling.temperature, accepted.sampling.seed) == (0.0, 0)
    assert isinstance(delta, Delta)
    assert len(delta.logprobs) == len(delta.token_ids)
    assert delta.logprobs[0].top == ()


async def test_logprobs_come_with_their_tokens(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        events = await collect(client, ClientRequest(prompt="x", sampling=PartialSampling(logprobs=2)))
    logprobs = [logprob for event in events if isinstance(event, Delta) for logprob in event.logprobs]
    assert [logprob.token_id for logprob in logprobs] == tokens_of(events)
    assert logprobs[0].top == ((ord("y"), -0.5), (ord("z"), -1.5))


async def test_logprobs_of_the_prompt_come_first_and_again_with_resume(
    serve: Serve, tokenizer: Tokenizer
) -> None:
    """The prompt is longer than a chunk, so there are several events; a reader gets each once, in order."""
    prompt = "abcdefghijklmnopqrstuvw" * 10
    request = ClientRequest(
        prompt=prompt,
        request_id="scored",
        num_outputs=2,
        sampling=PartialSampling(prompt_logprobs=0, max_tokens=3),
    )
    lane = FakeLane(tokenizer, step_s=0.002, limits=Limits(step_tokens=64, chunk_tokens=64, max_running=8))
    async with serve(lane) as client:
        events = await collect(client, request)
        again = [event async for event in client.resume("scored", [Position(output_index=0, token_index=2)])]
    for read in (events, again):
        scores = [event for event in read if isinstance(event, PromptLogprobs)]
        first_index = 1
        for each in scores:
            assert each.first_index == first_index
            first_index += len(each.logprobs)
        assert [one.token_id for each in scores for one in each.logprobs] == list(prompt[1:].encode())
        first = next(i for i, e in enumerate(read) if isinstance(e, Delta) and e.output_index == 0)
        assert all(read.index(each) < first for each in scores)
    assert len([event for event in events if isinstance(event, PromptLogprobs)]) > 1, "they stream"
    whole = WholeAnswer()
    for event in events:
        whole.add(event)
    assert whole.prompt_logprobs[0].logprob == -1.0 - ord("b") / 100
    assert whole.text == "xyz"
    assert isinstance(events[0], Accepted)
    assert events[0].sampling.prompt_logprobs == 0


async def test_who_takes_too_long_ends_with_what_it_has(serve: Serve, tokenizer: Tokenizer) -> None:
    endless = FakeLane(tokenizer, script=lambda _: [ord("a")] * 500, step_s=0.01)
    async with serve(endless) as client:
        events = await collect(client, ClientRequest(prompt="b", timeout_s=0.2, num_outputs=2))
    ends = [event for event in events if isinstance(event, Finished)]
    assert [end.reason for end in ends] == [AnswerEnd.TIMEOUT] * 2
    for output_index, end in enumerate(sorted(ends, key=lambda end: end.output_index)):
        assert end.usage.completion_tokens == len(tokens_of(events, output_index)) > 0
    assert endless.num_pages_used == 0


async def test_a_character_in_pieces_comes_whole(serve: Serve, tokenizer: Tokenizer) -> None:
    answer = [*"né 你😀".encode(), tokenizer.special_id(IM_END)]
    async with serve(FakeLane(tokenizer, script=lambda _: answer, step_s=0.001)) as client:
        events = [event async for event in client.chat(HELLO)]
    assert text_of(events) == "né 你😀"
    assert not any("�" in event.text for event in events if isinstance(event, Delta))


def call_tokens(tokenizer: Tokenizer, name: str, arguments: str) -> list[int]:
    special = tokenizer.special_id
    return [
        *b"Let me look.",
        special(SECTION_BEGIN),
        special(CALL_BEGIN),
        *f"functions.{name}:0".encode(),
        special(CALL_ARGUMENTS),
        *arguments.encode(),
        special(CALL_END),
        special(SECTION_END),
        special(IM_END),
    ]


async def test_tool_calls_are_structured_and_end_in_tool_calls(serve: Serve, tokenizer: Tokenizer) -> None:
    answer = call_tokens(tokenizer, "get_weather", '{"city": "Paris"}')
    async with serve(FakeLane(tokenizer, script=lambda _: answer, step_s=0.001)) as client:
        events = [event async for event in client.chat(HELLO, tools=[WEATHER])]
    calls = [call for event in events if isinstance(event, Delta) for call in event.tool_calls]
    assert text_of(events) == "Let me look."
    assert (calls[0].id, calls[0].name) == ("functions.get_weather:0", "get_weather")
    assert all(call.id is None and call.name is None for call in calls[1:])
    assert "".join(call.arguments for call in calls) == '{"city": "Paris"}'
    assert len(calls) > 2  # arguments stream
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is AnswerEnd.TOOL_CALLS
    assert tokens_of(events) == answer


async def test_a_call_cut_by_length_ends_in_length(serve: Serve, tokenizer: Tokenizer) -> None:
    answer = call_tokens(tokenizer, "get_weather", '{"city": "Paris"}')
    async with serve(FakeLane(tokenizer, script=lambda _: answer)) as client:
        sampling = PartialSampling(max_tokens=len(answer) - 10)
        events = [event async for event in client.chat(HELLO, tools=[WEATHER], sampling=sampling)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is AnswerEnd.LENGTH


async def test_tools_keep_their_numbers(serve: Serve, tokenizer: Tokenizer) -> None:
    """A schema's 1 stays 1 on its way into the prompt: a protobuf Struct would have made it 1.0."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"minimum": 1, "é": None}}}
    async with serve(FakeLane(tokenizer)) as client:
        response = await client.apply_chat_template(Chat(messages=HELLO, tools=(tool,)))
    assert '{"function":{"name":"f","parameters":{"minimum":1,"é":null}},"type":"function"}' in response.text
    assert tokenizer.decode(response.token_ids) == response.text
