"""A constraint as a grammar for llguidance: Lark text, with JSON schemas in it and special tokens by id.

    start: TEXT? section?                           any text, then perhaps calls
    section: SECTION_BEGIN call+ SECTION_END
    call: call_0 | call_1 ...
    call_0: CALL_BEGIN "functions.NAME:" 0..9999 CALL_ARGUMENTS {json} CALL_END

Source of the envelope: Kimi-K2 docs/tool_call_guidance.md (k2_facts 4.7).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator

import llguidance

from k2dist.grammar.schema import MAX_SCHEMA_BYTES, UnfitError, check_text, ready_schema
from k2dist.messages import (
    CallableTool,
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    TextConstraint,
    ToolCalls,
)
from k2dist.text.tokenizer import CALL_ARGUMENTS, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END

MAX_TOOLS = 128
MAX_CALLS = 128
MAX_NAME_LENGTH = 256
MAX_CHOICES = 1024
_SCHEMA = re.compile(r"%json\s*")
_DECODER = json.JSONDecoder()
_ANY_OBJECT = '{"type": "object"}'

SpecialId = Callable[[str], int]

__all__ = ["MAX_SCHEMA_BYTES", "MAX_TOOLS", "mask_bytes", "write_grammar"]


def mask_bytes(vocab_size: int) -> int:
    """Of one mask: a bit per token, lowest first, in whole 32-bit words."""
    return -(-vocab_size // 32) * 4


def write_grammar(constraint: Constraint, special_id: SpecialId) -> str:
    """For `llguidance.LLMatcher`. UnfitError for what is refused here; llguidance may refuse more."""
    if isinstance(constraint, ToolCalls):
        return _grammars(_write_tools(constraint, special_id), constraint.text)
    return _grammars("start: @text", constraint)


def _grammars(main: str, text: TextConstraint | None) -> str:
    """`@text` in `main` is a grammar of its own, with its own spaces between lexemes."""
    grammars = [{"lark_grammar": f"%llguidance {{}}\n{main}"}]
    if text is not None:
        grammars.append({"name": "text", "lark_grammar": _write_text(text)})
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _write_text(constraint: TextConstraint) -> str:
    match constraint:
        case JsonSchema(schema=schema):
            return f"start: %json {ready_schema(schema)}"
        case JsonObject():
            return f"start: %json {ready_schema(_ANY_OBJECT)}"
        case Regex(pattern=pattern):
            check_text("regex", pattern)
            return f"start: /{llguidance.regex_to_lark(pattern, '')}/"
        case Choice(choices=choices):
            if not 1 <= len(choices) <= MAX_CHOICES:
                raise UnfitError(f"choice: {len(choices)} choices; use 1 to {MAX_CHOICES}")
            check_text("choice", "\n".join(choices))
            return f"start: {' | '.join(map(_literal, choices))}"
        case Lark(grammar=grammar):
            check_text("lark", grammar)
            return _with_ready_schemas(grammar)


def _with_ready_schemas(grammar: str) -> str:
    """Schemas in a client's own grammar keep to what others keep to."""
    written, place = "", 0
    while found := _SCHEMA.search(grammar, place):
        try:
            _, end = _DECODER.raw_decode(grammar, found.end())
        except ValueError as error:
            raise UnfitError(f"%json: {error}") from error
        written += grammar[place : found.end()] + ready_schema(grammar[found.end() : end])
        place = end
    return written + grammar[place:]


def _write_tools(calls: ToolCalls, special_id: SpecialId) -> str:
    _check_tools(calls.tools)
    if calls.is_required:
        start = "section"
    elif calls.text is not None:
        start = "@text | section"
    else:
        start = "TEXT? section?"
    return "\n".join([f"start: {start}", "TEXT: /(.|\\n)+/", *_write_section(calls, special_id)])


def _write_section(calls: ToolCalls, special_id: SpecialId) -> Iterator[str]:
    def mark(name: str) -> str:
        return f"<[{special_id(name)}]>"

    if calls.max_calls is not None and not 1 <= calls.max_calls <= MAX_CALLS:
        raise UnfitError(f"max_calls: {calls.max_calls}; use 1 to {MAX_CALLS}, or none")
    times = "+" if calls.max_calls is None else f"{{1,{calls.max_calls}}}"
    yield f"section: {mark(SECTION_BEGIN)} call{times} {mark(SECTION_END)}"
    yield f"call: {' | '.join(f'call_{index}' for index in range(len(calls.tools)))}"
    for index, tool in enumerate(calls.tools):
        head = f"{mark(CALL_BEGIN)} HEAD_{index} {mark(CALL_ARGUMENTS)}"
        yield f"call_{index}: {head} arguments_{index} {mark(CALL_END)}"
        yield f"HEAD_{index}: {_literal(f'functions.{tool.name}:')} /0|[1-9][0-9]{{0,3}}/"
        yield f"arguments_{index}: %json {_arguments(tool)}"


def _arguments(tool: CallableTool) -> str:
    if tool.parameters is None:
        return ready_schema(_ANY_OBJECT)
    try:
        return ready_schema(tool.parameters, must_be_object=True)
    except UnfitError as error:
        raise UnfitError(f"{tool.name}: parameters: {error}") from error


def _check_tools(tools: tuple[CallableTool, ...]) -> None:
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise UnfitError(f"{len(tools)} tools; use 1 to {MAX_TOOLS}")
    for name, count in Counter(tool.name for tool in tools).items():
        if count > 1:
            raise UnfitError(f"{name!r} is declared {count} times; a call could not say which it means")
        if not name or name != name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise UnfitError(
                f"{name[:MAX_NAME_LENGTH]!r} is no name: use 1 to {MAX_NAME_LENGTH} printable characters"
            )


def _literal(text: str) -> str:
    """Lark's string literals have JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
