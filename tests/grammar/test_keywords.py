"""Every keyword of JSON Schema 2020-12: kept to the letter, an annotation, or refused by its name."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_specifications
import pytest

from k2dist.errors import RequestError
from k2dist.grammar import Grammars
from k2dist.messages import CallableTool, Constraint, JsonSchema, ToolCalls
from k2dist.text.tokenizer import Tokenizer
from tests.grammar.conftest import allowed, check_valid, walk

VOCABULARIES = ["core", "applicator", "unevaluated", "validation", "format-annotation", "content"]
VOCABULARIES += ["meta-data"]
EARLIER = {"definitions", "dependencies", "additionalItems", "$recursiveRef"}  # and `items` as a list

INT = {"type": "integer"}
OBJECT = {"type": "object"}
ARRAY = {"type": "array"}
TEXT = {"type": "string"}

# (schema, what satisfies it, what does not)
KEPT: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"$id": "https://x.y/z", "$ref": "https://x.y/z#/$defs/a", "$defs": {"a": INT}}, ["1"], ['"a"']),
    ({"$id": "https://x.y/z", "$ref": "a.json", "$defs": {"a": {"$id": "a.json", **INT}}}, ["1"], ['"a"']),
    ({"$ref": "#a", "$defs": {"b": {"$anchor": "a", **INT}}}, ["1"], ['"a"']),
    ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": INT}}, ["3"], ["2", '"a"']),
    ({"$ref": "#/a/b", "a": {"b": {**OBJECT, "minProperties": 1}}}, ['{"a":1}'], ["{}"]),
    ({"$ref": "#/definitions/a", "definitions": {"a": INT}}, ["1"], ['"a"']),
    ({"$schema": "https://json-schema.org/draft/2020-12/schema", **INT}, ["1"], ['"a"']),
    ({**ARRAY, "prefixItems": [INT], "items": False}, ["[1]", "[]"], ['["a"]', "[1,2]"]),
    ({**ARRAY, "items": [INT], "additionalItems": False}, ["[1]"], ['["a"]', "[1,2]"]),
    ({"items": INT}, ["[1]", '"a"'], ['["a"]']),
    ({**ARRAY, "minItems": 1, "maxItems": 2}, ["[1]", "[1,2]"], ["[]", "[1,2,3]"]),
    ({"properties": {"a": INT}}, ['{"a":1}', "{}", '{"b":"x"}', "2"], ['{"a":"x"}']),
    ({**OBJECT, "properties": {"a": True, "b": False}}, ['{"a":1}'], ['{"b":1}']),
    ({**OBJECT, "patternProperties": {"^x": INT}}, ['{"x1":1}', '{"y":"s"}'], ['{"xa":"s"}']),
    ({"properties": {"xa": {"minimum": 5}}, "patternProperties": {"^x": INT}}, ['{"xa":6}'], ['{"xa":2}']),
    ({**OBJECT, "patternProperties": {"x": INT}, "additionalProperties": False}, ['{"ax":1}'], ['{"b":1}']),
    ({**OBJECT, "additionalProperties": INT}, ['{"a":1}'], ['{"a":"s"}']),
    ({**OBJECT, "required": ["a"], "additionalProperties": INT}, ['{"a":1}'], ['{"a":"s"}', '{"b":1}']),
    ({**OBJECT, "minProperties": 1, "maxProperties": 1}, ['{"a":1}'], ["{}", '{"a":1,"b":1}']),
    ({"allOf": [INT, {"minimum": 3}]}, ["3"], ["2", '"a"']),
    ({"anyOf": [INT, {"type": "null"}]}, ["3", "null"], ['"a"']),
    ({"oneOf": [INT, {"type": "null"}]}, ["3", "null"], ['"a"']),
    ({"type": ["integer", "null"]}, ["1", "null"], ['"a"', "1.5"]),
    ({"const": 1.5}, ["1.5"], ["1", "1.50001"]),
    ({"const": 1.0}, ["1"], ["2", "1.1"]),
    ({"const": {"a": [1, None]}}, ['{"a":[1,null]}'], ['{"a":[1]}']),
    ({"enum": ["a", 5], **INT}, ["5"], ['"a"']),
    ({"enum": ["aa", "b"], "maxLength": 1}, ['"b"'], ['"aa"']),
    ({"enum": [[1, 2], [1]], "maxItems": 1}, ["[1]"], ["[1,2]"]),
    ({"enum": [{"a": 1}, {"b": 1}], "required": ["b"]}, ['{"b":1}'], ['{"a":1}']),
    ({"multipleOf": 3}, ["3", "0", "-3", '"a"'], ["4"]),
    ({"type": "number", "multipleOf": 0.01}, ["0.5", "1.25"], ["0.333"]),
    ({"multipleOf": 1000, "anyOf": [{"multipleOf": 0.25}, {"multipleOf": 1e-06}]}, ["2000"], ["2500"]),
    ({**INT, "multipleOf": 3, "minimum": 10, "maximum": 13}, ["12"], ["10", "15"]),
    ({"type": "number", "minimum": 1.5, "maximum": 2.5}, ["1.5", "2.5", "2"], ["1.4", "2.51", "25e-1"]),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, ["1.5", '"a"'], ["1", "2", "2.0", "1.0"]),
    ({**TEXT, "minLength": 2, "maxLength": 3}, ['"ab"', '"äöü"'], ['"a"', '"abcd"']),
    ({"pattern": "b"}, ['"abc"', "1"], ['"ac"']),
    ({**TEXT, "minLength": 2, "pattern": "^a*$"}, ['"aa"'], ['"a"', '"ab"']),
    ({**TEXT, "pattern": "^(?:a|b)$|^c"}, ['"a"', '"cd"'], ['"ab"', '"dc"']),
    ({**TEXT, "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"1900-02-29"', '"a"']),
    ({**TEXT, "format": "time", "pattern": "Z$"}, ['"23:59:59Z"'], ['"12:00:60Z"', '"12:00:00+01:00"']),
    ({**TEXT, "format": "date-time"}, ['"2024-01-31T00:00:00Z"'], ['"2023-02-29T12:00:00Z"']),
]
ANNOTATIONS: dict[str, Any] = {
    "$comment": "x",
    "title": "x",
    "description": "x",
    "default": "x",
    "examples": ["x"],
    "deprecated": True,
    "readOnly": True,
    "writeOnly": True,
    "contentEncoding": "base64",
    "contentMediaType": "text/plain",
    "contentSchema": TEXT,
    "$vocabulary": {"https://x.y": True},
    "nullable": True,
    "x-own": 1,
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": INT}, "not"),
    ({"if": INT}, "if"),
    ({"then": INT}, "then"),
    ({"else": INT}, "else"),
    ({"contains": INT}, "contains"),
    ({"minContains": 2}, "minContains"),
    ({"maxContains": 2}, "maxContains"),
    ({"uniqueItems": True}, "uniqueItems"),
    ({"unevaluatedItems": False}, "unevaluatedItems"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
    ({"dependencies": {"a": ["b"]}}, "dependencies"),
    ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"$dynamicAnchor": "a"}, "$dynamicAnchor"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"$recursiveRef": "#"}, "$recursiveRef"),
    ({"$schema": "https://x.y/own"}, "$schema"),
    ({"minProperties": 2}, "minProperties"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "maxProperties"),
    ({"patternProperties": {"^x": {}, "y$": {}}}, "patternProperties"),
    ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, "oneOf"),
    ({"enum": []}, "enum"),
    ({"type": []}, "type"),
    ({"type": "integer", "const": "a"}, "const"),
    ({"const": 5, "minimum": 6}, "const"),
    ({"multipleOf": 0}, "multipleOf"),
    ({"multipleOf": 1000003}, "multipleOf"),
    ({"multipleOf": 1234.5678}, "multipleOf"),
    ({"multipleOf": 1e300}, "multipleOf"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
    ({"items": 3}, "items"),
    ({"anyOf": []}, "anyOf"),
    ({"additionalProperties": 3}, "additionalProperties"),
    ({**TEXT, "format": "regex"}, "format"),
    ({"required": ["a"], "additionalProperties": False, **OBJECT}, "required"),
    ({"$ref": "#/a/b", "a": {"b": {"minProperties": 2}}}, "minProperties"),
    ({"$ref": "#/$defs/none"}, "$ref"),
    ({"$ref": "b#/c", "$defs": {"b": {"$id": "b", "c": {"minProperties": 2}}}}, "$ref"),
]


def standard_keywords() -> set[str]:
    contents = jsonschema_specifications.REGISTRY.contents
    return {
        keyword
        for name in VOCABULARIES
        for keyword in contents(f"https://json-schema.org/draft/2020-12/meta/{name}")["properties"]
    }


def inner_keywords(schema: dict[str, Any]) -> set[str]:
    inner = [part for value in schema.values() for part in (value if isinstance(value, list) else [value])]
    deeper = (word for part in inner if isinstance(part, dict) for word in inner_keywords(part))
    return {*schema, *deeper}


def test_no_keyword_is_missing_here() -> None:
    tried = {word for schema, *_ in (*KEPT, *REFUSED) for word in inner_keywords(schema)}
    assert standard_keywords() | EARLIER <= {*ANNOTATIONS, *tried}
    assert len(standard_keywords()) > 50


STRANGE = ["null", "true", "-1", "1.5", "1e400", "1e30", '"#"', "[]", "{}", "[[null]]", '{"": {"a": null}}']
STRANGE += ['"\\ud800"', '["\\u0000"]']


@pytest.mark.parametrize("keyword", sorted(standard_keywords() | EARLIER))
def test_strange_values_are_taken_or_refused(keyword: str, bytes_grammars: Grammars) -> None:
    for value in STRANGE:
        schema = f'{{"items": {{"{keyword}": {value}}}, "{keyword}": {value}}}'
        try:
            bytes_grammars.check(JsonSchema(schema=schema))
        except RequestError as error:
            str(error).encode()


def takes(grammars: Grammars, schema: dict[str, Any], text: str) -> bool:
    state = grammars.begin(JsonSchema(schema=json.dumps(schema)))
    for token_id in text.encode():
        if token_id not in allowed(grammars, state):
            return False
        state.advance(token_id)
    return state.is_accepting


@pytest.mark.parametrize(("schema", "good", "bad"), KEPT, ids=lambda value: json.dumps(value)[:60])
def test_it_is_kept(
    schema: dict[str, Any], good: list[str], bad: list[str], bytes_grammars: Grammars
) -> None:
    assert [text for text in good if not takes(bytes_grammars, schema, text)] == []
    assert [text for text in bad if takes(bytes_grammars, schema, text)] == []


@pytest.mark.parametrize("keyword", ANNOTATIONS)
def test_an_annotation_changes_nothing(keyword: str, bytes_grammars: Grammars) -> None:
    schema = {"type": "integer", keyword: ANNOTATIONS[keyword]}
    assert takes(bytes_grammars, schema, "12")
    assert not takes(bytes_grammars, schema, '"x"')
    assert not takes(bytes_grammars, schema, "null")


@pytest.mark.parametrize(("schema", "keyword"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_it_is_refused_with_its_place(schema: dict[str, Any], keyword: str, bytes_grammars: Grammars) -> None:
    """Wherever it stands, in the arguments of a tool, and in an answer that may call one."""
    whole = {key: schema[key] for key in ("$defs", "a") if key in schema}  # what pointers go to
    part = {key: value for key, value in schema.items() if key not in whole}
    deep = json.dumps({"type": "object", "properties": {"deep": part}, "required": ["deep"], **whole})
    tools = (CallableTool(name="good"), CallableTool(name="bad", parameters=deep))
    text = JsonSchema(schema=deep)
    constraints: list[Constraint] = [text, ToolCalls(tools=tools), ToolCalls(tools=tools[:1], text=text)]
    for constraint in constraints:
        with pytest.raises(RequestError, match="cannot be enforced: ") as caught:
            bytes_grammars.check(constraint)
        assert keyword in caught.value.message


def test_the_place_is_that_of_the_keyword(bytes_grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"anyOf": [{}, {"not": {}}]}}}}
    with pytest.raises(RequestError, match=r"enforced: properties\.a\.items\.anyOf\.1\.not: Unimpl"):
        bytes_grammars.check(JsonSchema(schema=json.dumps(schema)))


FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_lets_through_has_it(
    name: str, bytes_tokenizer: Tokenizer, bytes_grammars: Grammars, seed: int
) -> None:
    schema = {"type": "string", "format": name}
    draw = random.Random(seed)
    for _ in range(20):
        state = bytes_grammars.begin(JsonSchema(schema=json.dumps(schema)))
        check_valid(bytes_tokenizer.decode(walk(bytes_tokenizer, bytes_grammars, state, draw)), schema)
