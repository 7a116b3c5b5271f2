"""What msgspec says of a value of the wrong type, as an error that names the field."""

from __future__ import annotations

import re

import msgspec

from k2dist.errors import RequestError

_PLACE = re.compile(r"(?P<fault>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)


def type_fault(field: str, error: msgspec.ValidationError) -> RequestError:
    """`field`: what was converted. "Expected `int`, got `str` - at `$.stop[0]`" is about `field.stop[0]`."""
    place = _PLACE.fullmatch(str(error))
    assert place is not None, "the pattern takes any text"
    return RequestError(f"{field}{place['path'] or ''}".removeprefix("."), place["fault"])
