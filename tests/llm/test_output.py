"""Outputs: what of the tokens is text, what a call, and why it ended."""

from k2dist.engine import Generated
from k2dist.ids import RequestId
from k2dist.llm import Ask, Chat, ChatMessage, SamplingParams, ToolCall
from k2dist.llm.ask import Prepare
from k2dist.llm.output import Output, answered
from k2dist.messages import FinishReason, Usage
from k2dist.text.tokenizer import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    IM_END,
    SECTION_BEGIN,
    SECTION_END,
)

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {}}}}},)
FIRST_CALL = ToolCall(id="functions.f:0", name="f", arguments="{}")
CHAT = Chat(
    messages=(
        ChatMessage(role="user", content="a"),
        ChatMessage(role="assistant", tool_calls=(FIRST_CALL,)),
        ChatMessage(role="tool", tool_call_id="functions.f:0", content="7"),
    ),
    tools=TOOLS,
)


def read(prepare: Prepare, ask: Ask, *outputs: Generated) -> Output:
    return answered(ask, prepare.request(RequestId("a"), ask), outputs, prepare)


def call(prepare: Prepare) -> list[int]:
    special = prepare.tokenizer.special_id
    head = [special(SECTION_BEGIN), special(CALL_BEGIN), *b"f", special(CALL_ARGUMENTS)]
    return [*b"Wait.", *head, *b'{"x": 1}', special(CALL_END), special(SECTION_END), special(IM_END)]


def test_a_call_is_no_text_and_is_why_it_ended(prepare: Prepare) -> None:
    tokens = call(prepare)
    generated = Generated(token_ids=tokens, finish=FinishReason.STOP, stop_match=tokens[-1])
    output = read(prepare, Ask(CHAT), generated)
    assert output.text == "Wait."
    assert output.tool_calls == (ToolCall(id="functions.f:1", name="f", arguments='{"x": 1}'),)
    assert output.finish_reason == "tool_calls"
    assert output.token_ids == tuple(tokens)
    assert output.message == ChatMessage(role="assistant", content="Wait.", tool_calls=output.tool_calls)


def test_a_call_that_was_cut_short_ended_by_its_length(prepare: Prepare) -> None:
    generated = Generated(token_ids=call(prepare)[:-6], finish=FinishReason.LENGTH)
    output = read(prepare, Ask(CHAT), generated)
    assert output.finish_reason == "length"
    assert [one.name for one in output.tool_calls] == ["f"]


def test_without_tools_nothing_is_a_call(prepare: Prepare) -> None:
    generated = Generated(token_ids=call(prepare), finish=FinishReason.STOP)
    output = read(prepare, Ask(Chat(messages=CHAT.messages)), generated)
    assert output.text == 'Wait.f{"x": 1}'
    assert (output.tool_calls, output.finish_reason) == ((), "stop")


def test_a_stop_string_is_no_text(prepare: Prepare) -> None:
    generated = Generated(token_ids=[*b"one, two"], finish=FinishReason.STOP, stop_match=", t")
    output = read(prepare, Ask("a", SamplingParams(stop=", t")), generated)
    assert output.text == "one"
    assert output.outputs[0].stop_match == ", t"


def test_usage_counts_the_prompt_once(prepare: Prepare) -> None:
    outputs = [
        Generated(
            token_ids=[97] * n,
            finish=FinishReason.LENGTH,
            usage=Usage(prompt_tokens=3, cached_tokens=cached, completion_tokens=n),
        )
        for n, cached in ((2, 0), (5, 2))
    ]
    output = read(prepare, Ask("abc", SamplingParams(n=2)), *outputs)
    assert output.usage == Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=7)
