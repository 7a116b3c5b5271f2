"""Requests between their protobuf form and ours, both ways: the server reads, the client writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.errors import RequestError
from k2dist.messages import (
    ChatMessage,
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    ToolCall,
)
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling, Position
from k2dist.text.chat import ToolChoice, ToolMode

_SCALARS = (  # the optional ones: ListFields has those that the client set, zeros too
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)

_MODES: dict[int, ToolMode] = {
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_REQUIRED: "required",
    pb.ToolChoice.MODE_NAMED: "named",
}


def read_request(message: pb.GenerateRequest) -> ClientRequest:
    """What the message asks; RequestError for no input, a malformed tool, or a field this version has not."""
    refuse_unknown(message, "")
    refuse_unknown(message.sampling, "sampling")
    return ClientRequest(
        prompt=_read_prompt(message),
        sampling=read_sampling(message.sampling, _read_constraint(message)),
        request_id=message.request_id if message.HasField("request_id") else None,
        num_outputs=message.num_outputs if message.HasField("num_outputs") else 1,
        tenant=message.tenant,
        priority=message.priority,
        timeout_s=message.timeout_s if message.HasField("timeout_s") else None,
        detached=message.detached,
        model=message.model,
    )


def _read_prompt(message: pb.GenerateRequest) -> str | tuple[int, ...] | Chat:
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "chat":
            return read_chat(message.chat)
        case _:
            raise RequestError("input", "missing; give one of text, token_ids and chat")


def _read_constraint(message: pb.GenerateRequest) -> Constraint | None:
    match message.WhichOneof("constraint"):
        case "json_schema":
            return JsonSchema(schema=message.json_schema)
        case "json_object":
            refuse_unknown(message.json_object, "json_object")
            return JsonObject()
        case "regex":
            return Regex(pattern=message.regex)
        case "choice":
            refuse_unknown(message.choice, "choice")
            return Choice(choices=tuple(message.choice.choices))
        case "lark":
            return Lark(grammar=message.lark)
        case _:
            return None


def read_sampling(message: pb.Sampling, constraint: Constraint | None = None) -> PartialSampling:
    given: dict[str, Any] = {
        field.name: value for field, value in message.ListFields() if field.name in _SCALARS
    }
    return PartialSampling(
        **given,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        constraint=constraint,
    )


def read_chat(chat: pb.Chat) -> Chat:
    refuse_unknown(chat, "chat")
    return Chat(
        messages=tuple(_read_message(index, message) for index, message in enumerate(chat.messages)),
        tools=tuple(_read_tool(f"chat.tools[{index}]", tool) for index, tool in enumerate(chat.tools)),
        tool_choice=_read_choice(chat.tool_choice),
        is_partial=chat.partial,
    )


def _read_choice(choice: pb.ToolChoice) -> ToolChoice:
    refuse_unknown(choice, "chat.tool_choice")
    mode = _MODES.get(choice.mode)
    if mode is None:
        raise RequestError("chat.tool_choice.mode", f"{choice.mode} is unknown here; use a newer server")
    parallel = choice.parallel if choice.HasField("parallel") else True
    return ToolChoice(mode=mode, name=choice.name, is_parallel=parallel)


def read_positions(positions: Iterable[pb.Position]) -> tuple[Position, ...]:
    return tuple(Position(output_index=p.output_index, token_index=p.token_index) for p in positions)


def _read_message(index: int, message: pb.ChatMessage) -> ChatMessage:
    refuse_unknown(message, f"chat.messages[{index}]")
    if not message.role:
        raise RequestError(f"chat.messages[{index}].role", "missing; use system, user, assistant or tool")
    return ChatMessage(
        role=message.role,
        content=message.content if message.HasField("content") else None,
        name=message.name if message.HasField("name") else None,
        tool_calls=tuple(ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in message.tool_calls),
        tool_call_id=message.tool_call_id if message.HasField("tool_call_id") else None,
    )


def _read_tool(field: str, tool: pb.Tool) -> dict[str, Any]:
    """The tool as the template shows it. A `json` form keeps whatever the client wrote."""
    match tool.WhichOneof("form"):
        case "json":
            return _read_object(f"{field}.json", tool.json)
        case "function":
            if not tool.function.name:
                raise RequestError(f"{field}.function.name", "missing; name the function")
            function: dict[str, Any] = {"name": tool.function.name}
            if tool.function.HasField("description"):
                function["description"] = tool.function.description
            if tool.function.HasField("parameters_json"):
                parameters = _read_object(f"{field}.function.parameters_json", tool.function.parameters_json)
                function["parameters"] = parameters
            if tool.function.HasField("strict"):
                function["strict"] = tool.function.strict
            return {"type": "function", "function": function}
        case _:
            raise RequestError(field, "empty; give function or json")


def _read_object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(field, f"a JSON {type(value).__name__}; need an object")
    return value


def refuse_unknown(message: ProtoMessage, field: str) -> None:
    """RequestError if the message holds fields of a later schema: to ignore them could be a wrong answer."""
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise RequestError(
            f"{field or message.DESCRIPTOR.name}",
            f"field number {unknown[0].field_number} is unknown here; leave it out or use a newer server",
        )


def write_request(request: ClientRequest) -> pb.GenerateRequest:
    message = pb.GenerateRequest(
        model=request.model,
        request_id=request.request_id,
        sampling=write_sampling(request.sampling),
        num_outputs=request.num_outputs,
        priority=request.priority,
        tenant=request.tenant,
        timeout_s=request.timeout_s,
        detached=request.detached,
    )
    if isinstance(request.prompt, str):
        message.text = request.prompt
    elif isinstance(request.prompt, Chat):
        message.chat.CopyFrom(write_chat(request.prompt))
    else:
        message.token_ids.CopyFrom(pb.TokenIds(ids=request.prompt))
    _write_constraint(message, request.sampling.constraint)
    return message


def _write_constraint(message: pb.GenerateRequest, constraint: Constraint | None) -> None:
    match constraint:
        case None:
            return
        case JsonSchema(schema=schema):
            message.json_schema = schema
        case JsonObject():
            message.json_object.SetInParent()
        case Regex(pattern=pattern):
            message.regex = pattern
        case Choice(choices=choices):
            message.choice.CopyFrom(pb.Choice(choices=choices))
        case Lark(grammar=grammar):
            message.lark = grammar
        case _:
            raise RequestError("sampling.constraint", "tools go with the conversation: see Chat")


def write_sampling(sampling: PartialSampling) -> pb.Sampling:
    return pb.Sampling(
        **{name: getattr(sampling, name) for name in _SCALARS},
        logit_bias=sampling.logit_bias,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
    )


def write_chat(chat: Chat) -> pb.Chat:
    tools = [pb.Tool(json=json.dumps(tool, ensure_ascii=False)) for tool in chat.tools]
    choice = chat.tool_choice
    mode = next(number for number, mode in _MODES.items() if mode == choice.mode)
    written = pb.ToolChoice(mode=mode, name=choice.name or None, parallel=choice.is_parallel)  # type: ignore[arg-type]
    return pb.Chat(
        messages=map(_write_message, chat.messages), tools=tools, tool_choice=written, partial=chat.is_partial
    )


def _write_message(message: ChatMessage) -> pb.ChatMessage:
    return pb.ChatMessage(
        role=message.role,
        content=message.content,
        name=message.name,
        tool_calls=map(_write_call, message.tool_calls),
        tool_call_id=message.tool_call_id,
    )


def _write_call(call: ToolCall) -> pb.ToolCall:
    arguments = call.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return pb.ToolCall(id=call.id, name=call.name, arguments=arguments)
