"""Tool calls: the ids a prompt shows, and the calls in what the model writes, read token by token.

    text SECTION_BEGIN CALL_BEGIN functions.NAME:N CALL_ARGUMENTS {json} CALL_END ... SECTION_END

Marks are known by token id, so the same characters inside a JSON string are text, and no cut can fall
inside a mark. Source: Kimi-K2 docs/tool_call_guidance.md, K2-Vendor-Verifier README, and the deviations
seen in the field (k2_facts 4.7).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from k2dist.errors import RequestError
from k2dist.messages import ChatMessage, ToolCall
from k2dist.text.stream import Utf8Stream
from k2dist.text.tokenizer import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    Tokenizer,
)

Tools = Sequence[Mapping[str, Any]]

_JSON_SPACE = " \t\r\n"
# Some answers spell the section's beginning so; it is no token of the vocabulary and comes as text.
_MISSPELT_SECTION = "<|tool_call_section_begin|>"


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call begins. `index` counts the answer's calls from 0. `name` is "" where the model gave none."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of call `index`'s JSON arguments, verbatim; to be appended."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Call `index` has all its arguments, or (`is_cut`) the answer ended inside them."""

    index: int
    is_cut: bool = False


Part = ContentDelta | CallStarted | ArgumentsDelta | CallEnded


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant message in whole."""

    content: str
    tool_calls: tuple[ToolCall, ...]


def normalise_ids(messages: Iterable[ChatMessage]) -> tuple[ChatMessage, ...]:
    """The conversation with every call renamed `functions.{name}:{n}`, n counting from 0 over all of it.

    The model copies the form it sees, so one foreign id spoils later calls. A tool message follows
    the latest call before it that had its `tool_call_id`; an id that no call had stays as it is.
    """
    new_ids: dict[str, str] = {}
    num_calls = 0
    renamed: list[ChatMessage] = []
    for message in messages:
        calls: list[ToolCall] = []
        for call in message.tool_calls if message.role == "assistant" else ():
            new_ids[call.id] = f"functions.{call.name}:{num_calls}"
            calls.append(replace(call, id=new_ids[call.id]))
            num_calls += 1
        if calls:
            message = replace(message, tool_calls=tuple(calls))
        if message.role == "tool" and message.tool_call_id is not None:
            message = replace(message, tool_call_id=new_ids.get(message.tool_call_id, message.tool_call_id))
        renamed.append(message)
    return tuple(renamed)


def collect(parts: Iterable[Part]) -> Answer:
    """The whole answer from its parts, as a client puts it together."""
    content = ""
    calls: list[ToolCall] = []
    for part in parts:
        match part:
            case ContentDelta(text):
                content += text
            case CallStarted(_, call_id, name):
                calls.append(ToolCall(id=call_id, name=name, arguments=""))
            case ArgumentsDelta(index, text):
                calls[index] = replace(calls[index], arguments=f"{calls[index].arguments}{text}")
            case CallEnded():
                pass
    return Answer(content, tuple(calls))


class ToolCallParser:
    """Reads one answer's tokens in pieces of any size; the parts, put together, do not depend on the pieces.

    Ids and names are handed on as the model wrote them, spaces round them removed. Beyond the regular form:
    - an id with no counter, or used before, becomes `functions.{name}:{n}`, n from `first_call` + index on;
    - an id with no name takes the one tool of `tools` that fits the arguments' keys, and waits for them;
    - no arguments are `{}`, and a JSON object encoded once more as a JSON string is taken out of it;
    - missing marks: a call ends where the next begins, and a call opens its section itself;
    - text between calls and after the section is dropped; special tokens that are no marks are, too.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Tools | None = None, *, first_call: int = 0) -> None:
        self._tokenizer = tokenizer
        self._signatures = tuple(_signature(index, tool) for index, tool in enumerate(tools or ()))
        self._first_call = first_call
        self._marks = {tokenizer.special_id(name): name for name in _MARKS}
        self._utf8 = Utf8Stream()
        self._place = _Place.CONTENT
        self._held_content = ""  # may turn out to be `_MISSPELT_SECTION`
        self._head = ""  # text since the last mark: an id, if arguments follow
        self._is_in_call = False  # at the head: CALL_BEGIN came
        self._call: _OpenCall | None = None
        self._used_ids: set[str] = set()
        self._parts: list[Part] = []
        self.num_calls = 0

    def push(self, token_ids: Iterable[int]) -> tuple[Part, ...]:
        """What these tokens add; neighbouring deltas of one kind come as one."""
        for token_id in token_ids:
            if not self._tokenizer.is_special(token_id):
                self._take_text(self._utf8.push(self._tokenizer.token_bytes(token_id)))
            elif token_id in self._marks:
                self._take_text(self._utf8.finish())
                self._take_mark(self._marks[token_id])
        return self._take_parts()

    def push_bytes(self, data: bytes) -> tuple[Part, ...]:
        """As `push`, for the bytes before a stop string of the token it cut (`stream.Passed.tail`)."""
        self._take_text(self._utf8.push(data))
        return self._take_parts()

    def finish(self, *, is_cut: bool) -> tuple[Part, ...]:
        """What is left. `is_cut`: the answer was ended from outside (length, stop string, abort)."""
        self._take_text(self._utf8.finish())
        self._emit_content(self._held_content)
        self._held_content = ""
        self._end_call(is_cut=is_cut)
        return self._take_parts()

    def _take_text(self, text: str) -> None:
        match self._place:
            case _Place.CONTENT:
                text = self._held_content + text
                cut = _safe_length(text)
                self._held_content = text[cut:]
                self._emit_content(text[:cut])
            case _Place.HEAD:
                self._head += text
            case _Place.ARGUMENTS:
                assert self._call is not None
                self._emit_arguments(self._call, self._call.arguments.push(text))

    def _take_mark(self, mark: str) -> None:
        if self._place is _Place.CONTENT:
            if mark not in (SECTION_BEGIN, CALL_BEGIN):
                return
            if not self._held_content.startswith(_MISSPELT_SECTION):
                self._emit_content(self._held_content)
            self._held_content = ""
        if mark == CALL_ARGUMENTS:
            if self._place is _Place.HEAD:
                self._start_call()
                self._place = _Place.ARGUMENTS
            return
        self._end_call(is_cut=False)
        self._place = _Place.HEAD
        self._is_in_call = mark == CALL_BEGIN

    def _start_call(self) -> None:
        call = _OpenCall(self.num_calls, self._head.strip())
        self.num_calls += 1
        self._head, self._is_in_call, self._call = "", False, call
        if not call.name and len(self._signatures) == 1:
            call.name = self._signatures[0].name
        if call.name or not self._signatures:
            self._announce(call)
        else:
            call.arguments.is_held = True

    def _announce(self, call: _OpenCall) -> None:
        call_id = (
            call.written_id if call.has_name or not call.name else f"functions.{call.name}:{call.counter}"
        )
        is_usable = call.counter is not None and call_id not in self._used_ids
        number = self._first_call + call.index
        while not is_usable:
            call_id = f"functions.{call.name}:{number}"
            is_usable = call_id not in self._used_ids
            number += 1
        self._used_ids.add(call_id)
        call.is_announced = True
        self._parts.append(CallStarted(call.index, call_id, call.name))

    def _end_call(self, *, is_cut: bool) -> None:
        """End what is open: a call, or an id that no arguments followed (an id cut short is no call)."""
        if self._call is None and self._is_in_call and self._head.strip() and not is_cut:
            self._start_call()
        call, self._call, self._head, self._is_in_call = self._call, None, "", False
        if call is None:
            return
        rest = call.arguments.finish(is_cut=is_cut)
        if not call.is_announced:
            call.name = _fitting_name(rest, self._signatures)
            self._announce(call)
        self._emit_arguments(call, rest)
        self._parts.append(CallEnded(call.index, is_cut))

    def _emit_content(self, text: str) -> None:
        if not text:
            return
        if self._parts and isinstance(last := self._parts[-1], ContentDelta):
            self._parts[-1] = ContentDelta(last.text + text)
        else:
            self._parts.append(ContentDelta(text))

    def _emit_arguments(self, call: _OpenCall, text: str) -> None:
        if not text:
            return
        if self._parts and isinstance(last := self._parts[-1], ArgumentsDelta):
            self._parts[-1] = ArgumentsDelta(call.index, last.text + text)
        else:
            self._parts.append(ArgumentsDelta(call.index, text))

    def _take_parts(self) -> tuple[Part, ...]:
        parts, self._parts = tuple(self._parts), []
        return parts


_MARKS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END)


class _Place(enum.Enum):
    CONTENT = enum.auto()  # before the first section or call
    HEAD = enum.auto()  # from there on, outside arguments: ids, and text that is dropped
    ARGUMENTS = enum.auto()


class _OpenCall:
    """A call whose end has not come. `written_id` is `functions.NAME:N`, or what the model made of it."""

    def __init__(self, index: int, written_id: str) -> None:
        head, _, tail = written_id.rpartition(":")
        is_counted = tail.strip().isdecimal()
        name = (head if is_counted else written_id).strip()
        self.index = index
        self.written_id = written_id
        self.name = "" if name in ("functions", "functions.") else name.removeprefix("functions.")
        self.has_name = bool(self.name)
        self.counter = tail.strip() if is_counted else None
        self.is_announced = False
        self.arguments = _Arguments()


class _Arguments:
    """A call's argument text on its way out: verbatim, without the spaces round it."""

    def __init__(self) -> None:
        self.is_held = False  # all of it waits for `finish`
        self._held = ""
        self._has_begun = False

    def push(self, text: str) -> str:
        """What can be sent. Trailing spaces wait, and so does a JSON string: it may hold the object."""
        self._held += text
        if not self._has_begun:
            self._held = self._held.lstrip(_JSON_SPACE)
            self._has_begun = bool(self._held)
            self.is_held |= self._held.startswith('"')
        if self.is_held:
            return ""
        ready = self._held.rstrip(_JSON_SPACE)
        self._held = self._held[len(ready) :]
        return ready

    def finish(self, *, is_cut: bool) -> str:
        """The rest; `{}` if there were no arguments and nothing cut them off."""
        rest = self._held.strip(_JSON_SPACE)
        if rest.startswith('"'):
            rest = _unwrapped(rest)
        return rest if self._has_begun or is_cut else "{}"


class _Parameters(msgspec.Struct, frozen=True):
    properties: dict[str, Any] = {}
    required: list[str] = []


class _Function(msgspec.Struct, frozen=True):
    name: str
    parameters: _Parameters | None = None


class _Tool(msgspec.Struct, frozen=True):
    function: _Function


@dataclass(frozen=True, slots=True)
class _Signature:
    name: str
    properties: frozenset[str]
    required: frozenset[str]


def _signature(index: int, tool: Mapping[str, Any]) -> _Signature:
    try:
        function = msgspec.convert(tool, _Tool).function
    except msgspec.ValidationError as error:
        raise RequestError(f"tools[{index}]", f"{error}; see OpenAI's function tools") from error
    parameters = function.parameters or _Parameters()
    return _Signature(function.name, frozenset(parameters.properties), frozenset(parameters.required))


def _fitting_name(arguments: str, signatures: Sequence[_Signature]) -> str:
    """The one tool that these arguments can be for; "" if none or several."""
    value = _json(arguments)
    if not isinstance(value, dict):
        return ""
    names = [s.name for s in signatures if s.required <= value.keys() <= s.properties]
    return names[0] if len(names) == 1 else ""


def _unwrapped(text: str) -> str:
    """The object in a JSON string that holds one; other text as it is."""
    inner = _json(text)
    return inner if isinstance(inner, str) and isinstance(_json(inner), dict) else text


def _json(text: str) -> object:
    """The value of JSON text; None if it is none (or nested too deeply to be a call's arguments)."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _safe_length(text: str) -> int:
    """How much of the content can be sent: all but a possible `_MISSPELT_SECTION` at its end.

    A whole one, with spaces after it, waits too: only a mark coming next shows that it was meant as one.
    """
    start = text.rfind("<")  # the misspelt mark has one only at its beginning
    tail = text[start:]
    is_begun = start >= 0 and _MISSPELT_SECTION.startswith(tail)
    is_whole = start >= 0 and tail.rstrip() == _MISSPELT_SECTION
    return start if is_begun or is_whole else len(text)
