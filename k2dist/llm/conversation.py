"""Conversations as people have them: lists of dicts in OpenAI's form, or of `ChatMessage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import msgspec

from k2dist.errors import RequestError
from k2dist.llm.faults import type_fault
from k2dist.messages import ChatMessage, ToolCall
from k2dist.text.chat import Chat

Conversation = Sequence[ChatMessage | Mapping[str, Any]]


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str | dict[str, Any]


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    function: _Function
    type: Literal["function"] = "function"


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[_TextPart] | None = None
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None


def read_chats(
    messages: Conversation | Sequence[Conversation], tools: Sequence[Mapping[str, Any]] = ()
) -> list[Chat]:
    """One conversation, or each of a list, as `read_chat`. An empty list is a list of none."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError("messages", f"a {type(messages).__name__}; give a list of messages")
    if messages and isinstance(messages[0], ChatMessage | Mapping):
        return [read_chat(cast(Conversation, messages), tools)]
    conversations = cast(Sequence[Conversation], messages)
    return [read_chat(one, tools, field=f"conversations[{i}].") for i, one in enumerate(conversations)]


def read_chat(messages: Conversation, tools: Sequence[Mapping[str, Any]] = (), *, field: str = "") -> Chat:
    """The conversation in our form; RequestError for a message of another form. `field`: what it is in."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"{field}messages", f"a {type(messages).__name__}; give a list of messages")
    if not messages:
        raise RequestError(f"{field}messages", "empty; give at least one message")
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"{field}tools", "give a list of dicts, as in OpenAI's function tools")
    return Chat(
        messages=tuple(_read(message, f"{field}messages[{i}]") for i, message in enumerate(messages)),
        tools=tuple(dict(tool) for tool in tools),
    )


def _read(message: ChatMessage | Mapping[str, Any], field: str) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    try:
        read = msgspec.convert(message, _Message)
    except msgspec.ValidationError as error:
        raise type_fault(field, error) from error
    content = read.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    calls = (
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in read.tool_calls or ()
    )
    return ChatMessage(
        role=read.role,
        content=content,
        name=read.name,
        tool_calls=tuple(calls),
        tool_call_id=read.tool_call_id,
    )
