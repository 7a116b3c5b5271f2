"""A client's JSON schema made ready for llguidance, or refused for what it could not keep to.

llguidance refuses by itself what it does not know (`not`, `if`, `uniqueItems`, `contains`, remote `$ref`);
annotations and unknown words are no constraints and pass. Refused here is what it would take and not keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from math import inf, lcm
from typing import Any, NoReturn
from urllib.parse import quote, unquote

MAX_SCHEMA_BYTES = 64 * 1024
MAX_NESTING = 64
MAX_MULTIPLES = 20_000
MAX_PATTERNS = 64  # of one object's properties; each two are compared: 300 take 4 s

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
# llguidance lets through 29 February of every year, and a second 60 in every minute. Years that 4 divides and
# not 100, or 400; a leap second, at the end of some days in UTC, is given up.
_LEAP = "(?:..(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = f"^(?:.{{5}}(?:0[13-9]|1|02-[01]|02-2[0-8])|{_LEAP}-02-29)"
_MAX_EXPONENT = 30
_FORMATS = {"date": (_DATE,), "time": ("^.{6}[0-5]",), "date-time": (_DATE, "^.{17}[0-5]")}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
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
    for keyword, value in schema.items():
        if any(_SURROGATE.search(inner) for inner in (keyword, *_strings(value))):
            raise UnfitError(f"{json.dumps(keyword)[1:-1]}: half of a surrogate pair is no character")
    if must_be_object:
        _make_object(schema)
    multiples: list[int | float] = []
    for part in _parts(schema):
        _check_part(part)
        _ease_(part)
        _tighten_(part)
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and multiple is not True and 0 < multiple < inf:
            multiples.append(multiple)
    _check_multiples(multiples)
    return json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False)


def check_text(what: str, text: str) -> None:
    """UnfitError: it is too long, or has half of a surrogate pair, which no answer can have."""
    if _SURROGATE.search(text):
        raise UnfitError(f"{what}: half of a surrogate pair is no character")
    num_bytes = len(text.encode())
    if num_bytes > MAX_SCHEMA_BYTES:
        raise UnfitError(f"{what}: {num_bytes} bytes; at most {MAX_SCHEMA_BYTES}")


def _parse(text: str) -> Any:
    check_text("the schema", text)
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


def _parts(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it: where one has to stand, and wherever else a `$ref` points to.

    A part may be changed before the next is asked for.
    """
    pending, seen = [(root, MAX_NESTING)], {id(root)}
    while pending:
        part, depth = pending.pop()
        if depth == 0:
            raise UnfitError(f"nested deeper than {MAX_NESTING}")
        yield part
        inner = [(each, depth - 1) for item in part.items() for _, each in inner_schemas(*item)]
        inner.append((_referred(root, part.get("$ref")), MAX_NESTING))
        for each, depth_left in inner:
            if isinstance(each, dict) and id(each) not in seen:
                seen.add(id(each))
                pending.append((each, depth_left))


def _referred(root: dict[str, Any], ref: Any) -> Any:
    """What a JSON pointer into the schema points to; None for a reference by name, of which llguidance knows
    where it may stand. UnfitError: it points elsewhere, and what is there would not have been looked at."""
    resource, _, pointer = ref.partition("#") if isinstance(ref, str) else ("", "", "")
    if not pointer.startswith("/"):
        return None
    value: Any = root if resource in ("", root.get("$id")) else None
    for name in unquote(pointer).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise UnfitError(f"$ref: {ref!r} points to nothing in the schema")
    return value


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


def _tighten_(schema: dict[str, Any]) -> None:
    """Add what llguidance does not keep to by itself."""
    patterns, all_of = _FORMATS.get(str(schema.get("format")), ()), schema.get("allOf", [])
    if patterns and isinstance(all_of, list):
        schema["allOf"] = [*all_of, *({"pattern": pattern} for pattern in patterns)]


def _check_part(schema: dict[str, Any]) -> None:
    """What llguidance would take and not keep, or could never write."""
    at_least, required = schema.get("minProperties"), schema.get("required")
    # It does not see that an additional key comes twice, and twice is once for whoever reads the JSON.
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(at_least, int | float) and at_least > max(1, num_required):
        raise UnfitError(f"minProperties: {at_least} cannot be enforced beyond the required ones")
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
        raise UnfitError(f"patternProperties: {len(patterns)} patterns; at most {MAX_PATTERNS}")
    named = [schema.get("const"), schema.get("enum"), schema.get("required"), list(_keys(schema))]
    for keyword, value in zip(("const", "enum", "required", "properties"), named, strict=True):
        if any(_UNWRITABLE.search(text) for text in _strings(value)):
            raise UnfitError(
                f"{keyword}: control characters other than \\b \\f \\n \\r \\t cannot be written"
            )


def _check_multiples(values: Sequence[int | float]) -> None:
    """A multiple of 7.5 is known by an automaton of 75 states, in both of two by one of their least common
    multiple. 10,000 states take 60 ms and 2 MB to make, 262,000 take 3 s and 150 MB."""
    places = [Decimal(str(value)).normalize().as_tuple() for value in values]
    digits = [int("".join(map(str, place.digits))) for place in places]
    exponents = [int(place.exponent) for place in places]
    if any(abs(exponent) > _MAX_EXPONENT for exponent in exponents):
        raise UnfitError(f"multipleOf: a power of ten beyond {_MAX_EXPONENT} cannot be enforced")
    least = min([0, *exponents])
    sizes = [n * 10 ** max(exponent, 0) for n, exponent in zip(digits, exponents, strict=True)]
    common = lcm(*(n * 10 ** (exponent - least) for n, exponent in zip(digits, exponents, strict=True)))
    while least < 0 and common % 10 == 0:
        common, least = common // 10, least + 1
    if max(common, sum(sizes)) > MAX_MULTIPLES:
        raise UnfitError(
            f"multipleOf: the digits of all of them come to {sum(sizes)}, their least common multiple to "
            f"{common}; at most {MAX_MULTIPLES} can be enforced"
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
