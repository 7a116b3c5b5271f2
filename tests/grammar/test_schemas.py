"""Whatever allowed tokens are drawn, what comes of them satisfies the schema."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from k2dist.errors import RequestError
from k2dist.grammar import Grammars
from k2dist.messages import CallableTool, JsonObject, JsonSchema, ToolCalls
from k2dist.text.tokenizer import Tokenizer
from k2dist.text.tool_calls import ToolCallParser, collect
from tests.grammar.conftest import CASES, Case, allowed, check_valid, walk


def test_the_schemas_are_many_and_of_all_kinds() -> None:
    text = json.dumps([case.schema for case in CASES])
    assert len(CASES) >= 150
    words = (
        "$ref",
        "anyOf",
        "oneOf",
        "allOf",
        "enum",
        "const",
        "pattern",
        "minimum",
        "multipleOf",
        "prefixItems",
    )
    assert all(f'"{word}"' in text for word in words)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_forced_call_is_valid(case: Case, tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    calls = ToolCalls(tools=(CallableTool(name="f", parameters=json.dumps(case.schema)),), is_required=True)
    taken = walk(tokenizer, grammars, grammars.begin(calls), random.Random(seed))
    parser = ToolCallParser(tokenizer)
    answer = collect(parser.push(taken) + parser.finish(is_cut=False))
    assert answer.content == ""
    assert answer.tool_calls
    for call in answer.tool_calls:
        assert call.name == "f"
        check_valid(str(call.arguments), case.schema)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_answer_is_valid(case: Case, tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    state = grammars.begin(JsonSchema(schema=json.dumps(case.schema)))
    check_valid(tokenizer.decode(walk(tokenizer, grammars, state, random.Random(seed))), case.schema)


def test_any_object(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    for number in range(10):
        taken = walk(tokenizer, grammars, grammars.begin(JsonObject()), random.Random(seed + number))
        assert isinstance(json.loads(tokenizer.decode(taken)), dict)


@pytest.mark.parametrize(
    ("schema", "text", "is_valid"),
    [
        # An escape is no way past a property's schema.
        ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"\\u0061":"x"}', False),
        ({"type": "string", "maxLength": 2}, '"\U0001f600\U0001f600"', True),  # characters, not bytes
        ({"type": "string"}, '"\\ud83d"', False),  # half a character
        ({"type": "number"}, "NaN", False),
        ({"type": "integer"}, "01", False),
        ({"type": "object"}, '{"a" : 1}', True),
        ({"type": "object"}, '{"a":  1}', False),  # spaces are bounded
        ({"type": "object"}, '{\n  "a": [\n    1\n  ]\n}', True),
        ({"type": "object"}, ' {}', False),
        ({"type": "object"}, '{} ', False),
        (True, "[1, {}]", True),
    ],
)  # fmt: skip
def test_what_is_let_through(schema: Any, text: str, is_valid: bool, bytes_grammars: Grammars) -> None:
    state = bytes_grammars.begin(JsonSchema(schema=json.dumps(schema)))
    is_let_through = True
    for token_id in text.encode():
        is_let_through &= token_id in allowed(bytes_grammars, state)
        if is_let_through:
            state.advance(token_id)
    assert (is_let_through and state.is_accepting) == is_valid


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"uniqueItems": true}', "uniqueItems"),
        ('{"properties": {"a": {"not": {}}}}', "not"),
        ('{"if": {}, "then": {}}', "if"),
        ('{"contains": {}}', "contains"),
        ('{"unevaluatedProperties": false}', "unevaluatedProperties"),
        ('{"dependentRequired": {"a": ["b"]}}', "dependentRequired"),
        ('{"type": "string", "pattern": "(?=a)b"}', "pattern"),
        ('{"type": "string", "pattern": "(a)\\\\1"}', "pattern"),
        ('{"type": "string", "format": "klingon"}', "format: klingon"),
        ('{"$ref": "https://example.org/a.json"}', "example.org"),
        ('{"$ref": "#/$defs/none"}', "none"),
        ('{"$ref": "#"}', "nothing satisfies it"),
        ('{"type": "string", "minLength": 5, "maxLength": 3}', "minLength"),
        ('{"type": "object", "minProperties": 2}', "minProperties"),
        ('{"enum": ["\\u0001"]}', "enum"),
        ('{"enum": ["\\ud800"]}', "enum"),
        ('{"description": "\\udfff"}', "description"),
        ('{"\\udfff": 1}', "\\udfff: half"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ('{"x-guidance": {"lenient": true}, "uniqueItems": true}', "uniqueItems"),
        ('{"required": 3}', "required"),
        ('{"type": "strang"}', "strang"),
        ("[]", "a JSON list"),
        ("false", "a JSON bool"),
        ("{", "not JSON"),
        ('{"maximum": NaN}', "NaN"),
        ("[" * 60_000, "64"),
        (json.dumps({"enum": ["x" * 70_000]}), "65536"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(schema: str, words: str, grammars: Grammars) -> None:
    with pytest.raises(RequestError, match="cannot be enforced") as caught:
        grammars.check(JsonSchema(schema=schema))
    assert caught.value.field == "json_schema"
    assert words in caught.value.message
    assert len(caught.value.message) < 300
    tools = (CallableTool(name="good", parameters="{}"), CallableTool(name="bad", parameters=schema))
    with pytest.raises(RequestError, match="cannot be enforced: bad: parameters: ") as caught:
        grammars.check(ToolCalls(tools=tools))
    assert caught.value.field == "tools"


def test_deep_nesting_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {}
    for _ in range(65):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested deeper than 64"):
        grammars.check(JsonSchema(schema=json.dumps(schema)))
