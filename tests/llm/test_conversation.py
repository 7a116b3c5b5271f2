"""Conversations in OpenAI's form, and what is refused."""

from typing import Any

import pytest

from k2dist.errors import RequestError
from k2dist.llm.conversation import read_chat, read_chats
from k2dist.messages import ChatMessage, ToolCall

CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "functions.f:0", "content": "7"},
]


def test_messages_in_openais_form() -> None:
    chat = read_chat(MESSAGES, [{"type": "function", "function": {"name": "f"}}])
    assert chat.messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="ab"),
        ChatMessage(role="assistant", tool_calls=(ToolCall(id="functions.f:0", name="f", arguments="{}"),)),
        ChatMessage(role="tool", tool_call_id="functions.f:0", content="7"),
    )
    assert chat.tools == ({"type": "function", "function": {"name": "f"}},)
    assert chat.num_calls == 1
    assert read_chat(chat.messages).messages == chat.messages


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "text": "a"}], "messages[0].text"),
        (
            [*MESSAGES[:2], {"role": "user", "tool_calls": [{"id": "a"}]}],
            "messages[2].tool_calls[0].function",
        ),
        (["Hello"], "conversations[0].messages"),
        ([[]], "conversations[0].messages"),
        ([MESSAGES, [{"role": 1}]], "conversations[1].messages[0].role"),
        ({"role": "user", "content": "a"}, "messages"),
        ("Hello", "messages"),
    ],
)
def test_another_form_is_refused_by_name(messages: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_chats(messages)
    assert caught.value.field == field


def test_tools_are_a_list() -> None:
    with pytest.raises(RequestError) as caught:
        read_chats(MESSAGES, {"type": "function"})  # type: ignore[arg-type]
    assert caught.value.field == "tools"
