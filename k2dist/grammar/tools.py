"""From a conversation's tools and tool choice, as OpenAI has them, to the constraint that enforces them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from k2dist.errors import RequestError
from k2dist.messages import CallableTool, Constraint, ToolCalls
from k2dist.text.chat import Chat


def answer_constraint(prompt: str | Sequence[int] | Chat, text: Constraint | None) -> Constraint | None:
    """What binds an answer to `prompt`. `text`: what an answer without calls must be; None: any text.

    Without tools, or with the choice "none", that is `text` itself. RequestError names what is wrong.
    """
    if not isinstance(prompt, Chat):
        return text
    return _chat_constraint(prompt, text)


def _chat_constraint(chat: Chat, text: Constraint | None) -> Constraint | None:
    choice, tools = chat.tool_choice, tuple(_callable(i, tool) for i, tool in enumerate(chat.tools))
    if not tools:
        if choice.mode in ("required", "named"):
            raise RequestError("tool_choice", f"{choice.mode!r} needs tools; declare some")
        return text
    if choice.mode == "none":
        return text
    if isinstance(text, ToolCalls):
        raise RequestError("sampling.constraint", "tool calls already; leave tools out, or the constraint")
    if choice.mode == "named":
        tools = tuple(tool for tool in tools if tool.name == choice.name)
        if not tools:
            raise RequestError("tool_choice", f"{choice.name!r} is not among the tools")
    is_required = choice.mode != "auto"
    return ToolCalls(
        tools=tools,
        is_required=is_required,
        max_calls=1 if choice.mode == "named" or not choice.is_parallel else None,
        text=None if is_required else text,
    )


def _callable(index: int, tool: dict[str, Any]) -> CallableTool:
    """`strict: false` asks for any JSON object. Properties come in the order in which the prompt has them."""
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"tools[{index}]", "function.name is missing; name the function")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not (strict is None or isinstance(strict, bool)):
        raise RequestError(f"tools[{index}]", f"function.strict is {strict!r}; use true or false")
    if parameters is None or strict is False:
        return CallableTool(name=function["name"])
    return CallableTool(
        name=function["name"],
        parameters=json.dumps(parameters, ensure_ascii=False, sort_keys=True),  # as `text.chat` renders them
    )
