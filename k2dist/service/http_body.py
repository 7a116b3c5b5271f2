"""A JSON request body as a typed value; what is wrong in it is named by the client's own field.

Bodies are read in two steps, so that fields that change nothing can be passed over before the rest is held to
its type: an unknown field that could change the answer is an error, never ignored.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from k2dist.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)

# The wire's unsigned field, so that a number too large is a refusal and not a fault of the protocol.
Uint32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]

_MAX_FIELD_LENGTH = 200
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*?)`(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*?)`(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
# A part of a message, of another kind than there are here: what msgspec says of one kind, and of several.
_OTHER_KIND = re.compile(
    r"Invalid (?:enum )?value '(?P<kind>[^']*)' - at `\$(?P<path>\.messages\[\d+\]\.content\[.*)\.type`$"
)
_WRONG = re.compile(r"(?P<what>.*) - at (?:`key` in )?`\$(?P<path>.*)`$", re.DOTALL)


def read_object(body: bytes) -> dict[str, Any]:
    """The body's fields. RequestError: it is no JSON object."""
    try:
        value = msgspec.json.decode(body)
        # Lone surrogates pass some parsers and no encoder; a number such as 1e400 is no number.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode's errors are ValueErrors
        raise RequestError("", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("", "the body is not a JSON object")
    return value


def read_fields(fields: dict[str, Any], kind: type[T], harmless: frozenset[str]) -> T:
    """The fields as `kind`. Those at the top that are null or in `harmless` count as not sent.

    RequestError, naming the field: unknown, missing, of a wrong type, a number out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None and name not in harmless}
    try:
        return msgspec.convert(given, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error


def _refusal(message: str) -> RequestError:
    """RequestError of msgspec's words, such as "Expected `int`, got `str` - at `$.messages[0].n`"."""
    if found := _UNKNOWN.match(message):
        return RequestError(_field(found["path"], found["name"]), "unknown here; leave it out")
    if found := _MISSING.match(message):
        return RequestError(_field(found["path"], found["name"]), "missing")
    if found := _OTHER_KIND.match(message):
        return RequestError(
            _field(found["path"], ""), f"{found['kind']}: not read here; this model takes text and tools only"
        )
    if found := _WRONG.match(message):
        return RequestError(_field(found["path"], ""), found["what"].replace("`", ""))
    return RequestError("", message.replace("`", ""))


def _field(path: str | None, name: str) -> str:
    """Where, as the client would write it; not more of it than an error should repeat."""
    return ".".join(part for part in ((path or "").lstrip("."), name) if part)[:_MAX_FIELD_LENGTH]
