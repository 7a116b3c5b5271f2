"""Anthropic's request bodies as k2dist's requests. Pure.

Temperature: what a client asks is multiplied by 0.6, as Moonshot's own Anthropic endpoint does (Kimi-K2
README): clients of this API are tuned to a scale on which 1.0 is the usual. Without one it is the model's.
Source: Anthropic's API reference, Messages and count_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from k2dist.errors import RequestError
from k2dist.messages import ChatMessage, Constraint, JsonSchema, Message, ToolCall
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling
from k2dist.service.http_body import Uint32, read_fields
from k2dist.text.chat import ToolChoice

TEMPERATURE_SCALE = 0.6

# Fields that are accepted and change nothing here: billing, caching, routing, speed, context kept by clients.
HARMLESS = frozenset(
    {
        "cache_control",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
# Ours -> theirs, for refusals that come from the coordinator.
FIELDS = {"prompt": "messages", "stop": "stop_sequences", "parallel_tool_calls": "tool_choice"}


class AnthropicAsked(Message, frozen=True, kw_only=True):
    request: ClientRequest
    is_streamed: bool = False


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Block(_Strict, frozen=True, kw_only=True, tag_field="type"):
    cache_control: Any = None


class _Text(_Block, frozen=True, kw_only=True, tag="text"):
    text: str
    citations: Any = None


class _ToolUse(_Block, frozen=True, kw_only=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None  # who called it; there is one way here


class _ToolResult(_Block, frozen=True, kw_only=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[_Text] = ""
    is_error: bool | None = None


class _Thinking(_Block, frozen=True, kw_only=True, tag="thinking"):
    """Of another model's turn: K2-Instruct's template shows none."""

    thinking: str
    signature: str = ""


class _HiddenThinking(_Block, frozen=True, kw_only=True, tag="redacted_thinking"):
    data: str


class _Message(_Strict, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Text | _ToolUse | _ToolResult | _Thinking | _HiddenThinking]


class _Tool(_Strict, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1)]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None  # arguments always stream as they come


class _Choice(_Strict, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class _ThinkingChoice(_Strict, frozen=True, kw_only=True):
    """K2-Instruct does not think: where that is the model's choice it chooses not to, and of a budget, which
    is a bound, it uses nothing."""

    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: Uint32 | None = None
    display: Any = None


class _ClearThinking(_Strict, frozen=True, kw_only=True, tag_field="type", tag="clear_thinking_20251015"):
    """Done before it is asked: no thinking of earlier turns is shown to the model."""

    keep: Any = None


class _ContextManagement(_Strict, frozen=True, kw_only=True):
    edits: list[_ClearThinking] = []


class _Format(_Strict, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(_Strict, frozen=True, kw_only=True):
    format: _Format | None = None
    effort: Any = None  # how long to think


class _CountBody(_Strict, frozen=True, kw_only=True):
    """What decides the prompt."""

    messages: list[_Message]
    model: str = ""
    system: str | list[_Text] = ""
    tools: list[_Tool] = []
    tool_choice: _Choice | None = None
    thinking: _ThinkingChoice | None = None
    context_management: _ContextManagement | None = None
    output_config: _OutputConfig | None = None


class _MessagesBody(_CountBody, frozen=True, kw_only=True):
    max_tokens: Uint32
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: float | None = None
    top_k: Uint32 | None = None
    stop_sequences: list[str] = []
    detached: bool = False  # losing the stream does not end the request: it can be resumed


def read_messages_body(fields: dict[str, Any], request_id: str) -> AnthropicAsked:
    """A message to be made. RequestError names what is wrong, or cannot be done here."""
    body = read_fields(fields, _MessagesBody, HARMLESS)
    temperature = None if body.temperature is None else body.temperature * TEMPERATURE_SCALE
    sampling = PartialSampling(
        temperature=temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        max_tokens=body.max_tokens,
        stop=tuple(body.stop_sequences),
        constraint=_read_format(body.output_config),
    )
    request = ClientRequest(
        prompt=_read_chat(body),
        sampling=sampling,
        request_id=request_id,
        detached=body.detached,
        model=body.model,
    )
    return AnthropicAsked(request=request, is_streamed=body.stream)


def read_count_body(fields: dict[str, Any]) -> Chat:
    """The conversation whose tokens are to be counted."""
    return _read_chat(read_fields(fields, _CountBody, HARMLESS))


def _read_chat(body: _CountBody) -> Chat:
    """A last message of the assistant is the beginning of the answer."""
    messages: list[ChatMessage] = []
    system = _joined(body.system)
    if system:
        messages.append(ChatMessage(role="system", content=system))
    _check_results(body.messages)
    for index, message in enumerate(body.messages):
        messages += _read_message(f"messages[{index}]", message)
    choice = body.tool_choice
    hides_tools = choice is not None and choice.type == "none"  # what is not shown is not called
    return Chat(
        messages=tuple(messages),
        tools=() if hides_tools else tuple(_read_tool(tool) for tool in body.tools),
        tool_choice=_read_choice(body),
        is_partial=bool(body.messages) and body.messages[-1].role == "assistant",
    )


def _read_message(field: str, message: _Message) -> list[ChatMessage]:
    """One message, or several: results of tools are messages of their own for the model, before the text."""
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    results: list[ChatMessage] = []
    calls: list[ToolCall] = []
    text = ""
    for index, block in enumerate(message.content):
        place = f"{field}.content[{index}]"
        match block:
            case _Text():
                text += block.text
            case _ToolUse():
                _check_role(place, "tool_use", message.role, "assistant")
                calls.append(ToolCall(id=block.id, name=block.name, arguments=block.input))
            case _ToolResult():
                _check_role(place, "tool_result", message.role, "user")
                result = ChatMessage(
                    role="tool", content=_joined(block.content), tool_call_id=block.tool_use_id
                )
                results.append(result)
            case _Thinking() | _HiddenThinking():
                _check_role(place, "thinking", message.role, "assistant")
    if results and not text:
        return results
    return [*results, ChatMessage(role=message.role, content=text, tool_calls=tuple(calls))]


def _check_results(messages: Sequence[_Message]) -> None:
    """RequestError for a result that answers no call of the assistant's turn before it, or one answered
    already. Messages of one role in a row are one turn."""
    unanswered: set[str] = set()
    role = ""
    for index, message in enumerate(messages):
        if message.role == "assistant" != role:
            unanswered = set()
        role = message.role
        for number, block in enumerate(message.content if not isinstance(message.content, str) else ()):
            if isinstance(block, _ToolUse):
                unanswered.add(block.id)
            elif isinstance(block, _ToolResult) and block.tool_use_id in unanswered:
                unanswered.remove(block.tool_use_id)
            elif isinstance(block, _ToolResult):
                raise RequestError(
                    f"messages[{index}].content[{number}].tool_use_id",
                    f"{block.tool_use_id!r} is no unanswered tool_use of the assistant's turn before it",
                )


def _check_role(place: str, kind: str, role: str, wanted: str) -> None:
    if role != wanted:
        raise RequestError(place, f"{kind} in a message of the {role}; only the {wanted} has one")


def _joined(content: str | list[_Text]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _read_tool(tool: _Tool) -> dict[str, Any]:
    """As the model knows tools."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _read_choice(body: _CountBody) -> ToolChoice:
    choice = body.tool_choice
    if choice is None:
        return ToolChoice()
    is_parallel = not choice.disable_parallel_tool_use
    if choice.type == "any":
        if not body.tools:
            raise RequestError("tool_choice", "any, but there are no tools")
        return ToolChoice(mode="required", is_parallel=is_parallel)
    if choice.type == "tool":
        name = choice.name or ""
        if name not in (tool.name for tool in body.tools):
            raise RequestError("tool_choice.name", f"{name!r} is not one of tools")
        return ToolChoice(mode="named", name=name, is_parallel=is_parallel)
    return ToolChoice(mode=choice.type, is_parallel=is_parallel)


def _read_format(config: _OutputConfig | None) -> Constraint | None:
    if config is None or config.format is None:
        return None
    return JsonSchema(schema=msgspec.json.encode(config.format.schema).decode())
