"""A client's JSON schema made ready for llguidance, or refused for what it could not keep to.

llguidance refuses by itself what it does not know (`not`, `if`, `uniqueItems`, `contains`, remote `$ref`);
annotations and unknown words are no constraints and pass. Refused here is what it would take and not keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import quote

MAX_SCHEMA_BYTES = 64 * 1024
MAX_NESTING = 64

# Besides none: one space, or a new line with its indentation, as Python's and JavaScript's printers write.
# Without a bound, a model that has lost its way writes spaces until it is cut off.
_SPACE = r" |\n[ \t]{0,64}"
# No \uXXXX: the key "\u0061" would be another way to write the property "a", past its schema.
_ESCAPES = 'nrbtf\\"'
_OPTIONS = {
    "whitespace_pattern": _SPACE,
    "json_allowed_escapes": _ESCAPES,
    "lenient": False,
    "coerce_one_of": False,
}
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_SINGLES = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains")


class UnfitError(ValueError):
    """Cannot be enforced; the message names the keyword."""


def ready_schema(text: str, *, must_be_object: bool = False) -> str:
    """The schema as JSON text for llguidance's `%json`. UnfitError says what is wrong with it.

    must_be_object: of a tool's arguments, which are an object whether the schema says so or not.
    """
    schema = _parse(text)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise UnfitError(f"a JSON {type(schema).__name__}; a schema is an object")
    if must_be_object:
        _make_object(schema)
    for part in _parts(schema, MAX_NESTING):
        _check_part(part)
        _ease_(part)
    return json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False)


def _parse(text: str) -> Any:
    num_bytes = len(text.encode(errors="replace"))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise UnfitError(f"{num_bytes} bytes; at most {MAX_SCHEMA_BYTES}")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise UnfitError(f"nested deeper than {MAX_NESTING}") from error
    except ValueError as error:
        raise UnfitError(f"not JSON: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _make_object(schema: dict[str, Any]) -> None:
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise UnfitError(f"type: {kind!r}; a tool's arguments are an object")
    schema["type"] = "object"


def _parts(schema: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it, in the order of their appearance."""
    if depth == 0:
        raise UnfitError(f"nested deeper than {MAX_NESTING}")
    yield schema
    for keyword, value in schema.items():
        for _, inner in inner_schemas(keyword, value):
            if isinstance(inner, dict):
                yield from _parts(inner, depth - 1)


def inner_schemas(keyword: str, value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """What stands where a schema has to, in a keyword's value, and its place there."""
    if keyword in _MAPS and isinstance(value, dict):
        yield from (((name,), inner) for name, inner in value.items())
    elif keyword in _LISTS and isinstance(value, list):
        yield from (((index,), inner) for index, inner in enumerate(value))
    elif keyword in _SINGLES:
        yield (), value


def _ease_(schema: dict[str, Any]) -> None:
    """Rewrite what llguidance would refuse although it means something it knows."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if isinstance(schema.get("$ref"), str):
        schema["$ref"] = quote(schema["$ref"], safe="#/%:?=&~$!'()*+,;@-._")


def _check_part(schema: dict[str, Any]) -> None:
    """What llguidance would take and not keep, or could never write."""
    at_least, required = schema.get("minProperties"), schema.get("required")
    # It does not see that an additional key comes twice, and twice is once for whoever reads the JSON.
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(at_least, int | float) and at_least > max(1, num_required):
        raise UnfitError(f"minProperties: {at_least} cannot be enforced beyond the required ones")
    named = [schema.get("const"), schema.get("enum"), schema.get("required"), list(_keys(schema))]
    for keyword, value in zip(("const", "enum", "required", "properties"), named, strict=True):
        if any(_UNWRITABLE.search(text) for text in _strings(value)):
            raise UnfitError(
                f"{keyword}: control characters other than \\b \\f \\n \\r \\t cannot be written"
            )


def _keys(schema: dict[str, Any]) -> Iterator[str]:
    properties = schema.get("properties")
    yield from properties if isinstance(properties, dict) else ()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
