"""What msgspec says of a value of the wrong type, as an error that names the field."""

from __future__ import annotations

import re

import msgspec

from k2dist.errors import RequestError

_NAMED = re.compile(r"Object (?P<what>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)
_REMEDIES = {"contains unknown": "unknown; leave it out", "missing required": "missing"}
_PLACE = re.compile(r"(?P<fault>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)


def type_fault(field: str, error: msgspec.ValidationError) -> RequestError:
    """`field`: what was converted. "Expected `int`, got `str` - at `$.stop[0]`" is about `field.stop[0]`, and
    "Object contains unknown field `heat` - at `$.sampling`" about `field.sampling.heat`.
    """
    place = _PLACE.fullmatch(str(error))
    assert place is not None, "the pattern takes any text"
    path, fault = f"{field}{place['path'] or ''}", place["fault"]
    named = _NAMED.fullmatch(fault)
    if named is not None:
        path, fault = f"{path}.{named['name']}", _REMEDIES[named["what"]]
    return RequestError(path.removeprefix("."), fault)
