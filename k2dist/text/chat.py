"""K2-Instruct's chat template, version 2, as fragments in which only the template's own marks are control.

    <|im_system|>tool_declare<|im_middle|>[tools as JSON]<|im_end|>              if tools are given
    <|im_system|>system<|im_middle|>You are Kimi ...<|im_end|>newline            if no system message leads
    <|im_user|>NAME<|im_middle|>text<|im_end|>                                   user
    <|im_assistant|>NAME<|im_middle|>text[tool calls]<|im_end|>                  assistant
    <|im_system|>NAME<|im_middle|>text<|im_end|>                                 system, tool, all others
    <|im_assistant|>assistant<|im_middle|>                                       where the answer begins

Source: K2-Instruct chat_template from 0102674 on, K2-Instruct-0905 from 94a4053 on (k2_facts 4.5).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from k2dist.errors import RequestError
from k2dist.messages import ChatMessage, Message, ToolCall
from k2dist.text.tokenizer import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
    SECTION_BEGIN,
    SECTION_END,
    Fragment,
    Tokenizer,
)
from k2dist.text.tool_calls import Tools, normalise_ids

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
_ROLE_MARKS = {"user": IM_USER, "assistant": IM_ASSISTANT}


ToolMode = Literal["auto", "none", "required", "named"]


class ToolChoice(Message, frozen=True, kw_only=True):
    """Whether the answer calls tools. `name`: with "named", the one tool that it calls, once."""

    mode: ToolMode = "auto"
    name: str = ""
    is_parallel: bool = True  # False: one call at most


class Chat(Message, frozen=True, kw_only=True):
    """A conversation that the assistant is to continue. `tools`: JSON objects just as sent. `is_partial`: the
    last message is the assistant's own, and its answer goes on in it."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    is_partial: bool = False

    @property
    def num_calls(self) -> int:
        """Tool calls that the conversation has had: the next one's number."""
        return sum(len(message.tool_calls) for message in self.messages if message.role == "assistant")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    tools: Tools | None = None,
    *,
    add_generation_prompt: bool = True,
    is_partial: bool = False,
    specials_in_text: bool = False,
    rename_calls: bool = True,
) -> list[int]:
    """Prompt ids of a conversation.

    `specials_in_text` honours special names inside messages as the reference tokenizer does: byte parity
    with it, at the price that a user can forge turns. Otherwise as `render`.
    """
    fragments = render(
        messages,
        tools,
        add_generation_prompt=add_generation_prompt,
        is_partial=is_partial,
        rename_calls=rename_calls,
    )
    return encode_prompt(tokenizer, fragments, specials_in_text=specials_in_text)


def encode_prompt(
    tokenizer: Tokenizer, fragments: Sequence[Fragment], *, specials_in_text: bool = False
) -> list[int]:
    """Ids of a rendered prompt; `specials_in_text` as `encode_chat`."""
    if specials_in_text:
        return tokenizer.encode("".join(fragment.text for fragment in fragments), allow_special=True)
    return tokenizer.encode_fragments(fragments)


def render_text(
    messages: Sequence[ChatMessage],
    tools: Tools | None = None,
    *,
    add_generation_prompt: bool = True,
    is_partial: bool = False,
    rename_calls: bool = True,
) -> str:
    """The prompt as one string, for people and tests; encoding it would honour specials in messages."""
    fragments = render(
        messages,
        tools,
        add_generation_prompt=add_generation_prompt,
        is_partial=is_partial,
        rename_calls=rename_calls,
    )
    return "".join(fragment.text for fragment in fragments)


def render(
    messages: Sequence[ChatMessage],
    tools: Tools | None = None,
    *,
    add_generation_prompt: bool = True,
    is_partial: bool = False,
    rename_calls: bool = True,
) -> tuple[Fragment, ...]:
    """The prompt, cut where control tokens stand.

    `tools` are JSON objects just as the client sent them. `rename_calls` passes the conversation through
    `normalise_ids` first, which leaves ids in the model's own form alone; False renders ids verbatim.
    `is_partial` leaves the last message open, which takes the place of opening a new one.
    Raises RequestError for an empty conversation, for a tool message that answers no call, and for a partial
    message that is not the assistant's text.
    """
    if not messages:
        raise RequestError("messages", "empty; send at least one message")
    if rename_calls:
        messages = normalise_ids(messages)
    if is_partial:
        check_partial(messages)
    prompt = _prompt(messages, tools, add_generation_prompt=add_generation_prompt and not is_partial)
    return tuple(prompt)[: -1 if is_partial else None]  # without its <|im_end|>


def check_partial(messages: Sequence[ChatMessage]) -> None:
    """RequestError if nothing can go on with the last message."""
    if messages[-1].role != "assistant" or messages[-1].tool_calls:
        raise RequestError(f"messages[{len(messages) - 1}]", "partial, but not text of the assistant")


def _prompt(
    messages: Sequence[ChatMessage], tools: Tools | None, *, add_generation_prompt: bool
) -> Iterator[Fragment]:
    if tools:
        yield from _head(IM_SYSTEM, "tool_declare")
        yield _text(json.dumps(tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True))
        yield _control(IM_END)
    if messages[0].role != "system":
        yield from _head(IM_SYSTEM, "system")
        yield _text(DEFAULT_SYSTEM)
        yield _control(IM_END)
        yield _text("\n")  # after the automatic system message only, as in the template
    for index, message in enumerate(messages):
        yield from _message(index, message)
    if add_generation_prompt:
        yield from _head(IM_ASSISTANT, "assistant")


def _message(index: int, message: ChatMessage) -> Iterator[Fragment]:
    yield from _head(_ROLE_MARKS.get(message.role, IM_SYSTEM), message.name or message.role)
    if message.role == "tool":
        if not message.tool_call_id:
            raise RequestError(f"messages[{index}].tool_call_id", "missing; name the call that this answers")
        yield _text(f"## Return of {message.tool_call_id}\n")
    if message.content:
        yield _text(message.content)
    if message.role == "assistant" and message.tool_calls:
        yield _control(SECTION_BEGIN)
        for call in message.tool_calls:
            yield from _call(call)
        yield _control(SECTION_END)
    yield _control(IM_END)


def _call(call: ToolCall) -> Iterator[Fragment]:
    """One call; the function's name is in the id and nowhere else."""
    arguments = call.arguments
    yield _control(CALL_BEGIN)
    yield _text(call.id)
    yield _control(CALL_ARGUMENTS)
    yield _text(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
    yield _control(CALL_END)


def _head(mark: str, name: str) -> tuple[Fragment, ...]:
    return _control(mark), _text(name), _control(IM_MIDDLE)


def _control(name: str) -> Fragment:
    return Fragment(name, is_control=True)


def _text(text: str) -> Fragment:
    return Fragment(text, is_control=False)
