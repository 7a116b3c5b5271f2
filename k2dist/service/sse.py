"""Server-sent events that can be resumed: each names the place from which the rest can be made again.

    id: request:output:token:part

`token` tokens of the output are shown, and `part` of what comes after them: the beginning, what one delta
gave besides its last event, the end. With several outputs there is one such triple for each, joined by ";".
Nothing has to be remembered: Resume from `token` gives the same again, and the first `part` of it is
passed over.

The tokens may be cut into deltas in other places then, and so the events' text too. `part` therefore counts
what does not depend on cuts: characters of such text, and 1 for each other event.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from k2dist.errors import RequestError

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still here\n\n"

_PLACE = re.compile(r"(\d{1,4}):(\d{1,9}):(\d{1,9})(?:\.([0-9a-z]{1,12}))?")
_MAX_ID_LENGTH = 8192


class Frame(NamedTuple):
    """One event: its JSON, and its name where the API gives names. `piece`: two keys to text in the JSON that
    could as well have come in several events."""

    data: Mapping[str, Any]
    event: str | None = None
    piece: tuple[str, str] | None = None

    @property
    def size(self) -> int:
        """What it counts in `Place.part`."""
        return 1 if self.piece is None else len(self.data[self.piece[0]][self.piece[1]])

    def without(self, num_characters: int) -> Frame:
        """The event with the first characters of its piece left out."""
        assert self.piece is not None, "other events are shown whole or not at all"
        outer, inner = self.piece
        rest = self.data[outer] | {inner: self.data[outer][inner][num_characters:]}
        return self._replace(data={**self.data, outer: rest})


class Place(NamedTuple):
    """Where one output stands: tokens shown, what was shown since, what a writer must know to go on there."""

    token: int = 0
    part: int = 0
    state: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """What one event of an answer adds to one output (one number beyond the last: what follows them all).

    token_after: for a delta with tokens, the number shown once its last frame is. is_opening: frames of
    token 0, made again only for an output that is read from there.
    """

    output_index: int
    frames: Sequence[Frame]
    token_after: int | None = None
    state_after: str = ""
    is_opening: bool = False


class Numbering:
    """Gives events their ids. `places`: where a reader stands that goes on; none: from the beginning."""

    def __init__(self, request_id: str, places: Mapping[int, Place]) -> None:
        self._request_id = request_id
        self._hidden = {index: place.part for index, place in places.items()}
        self._places = {index: place._replace(part=0) for index, place in places.items()}

    def push(self, step: Step) -> Iterator[bytes]:
        """Of the step's events what has not been shown."""
        index = step.output_index
        if step.is_opening and self._places.get(index, Place()).token > 0:
            return
        for number, frame in enumerate(step.frames, start=1):
            place = self._places.get(index, Place())
            is_last = number == len(step.frames)
            if is_last and step.token_after is not None:
                place = Place(step.token_after, 0, step.state_after)
            else:
                place = place._replace(part=place.part + frame.size)
            self._places[index] = place
            num_hidden = min(self._hidden.get(index, 0), frame.size)
            if num_hidden > 0:
                self._hidden[index] -= num_hidden
            if num_hidden < frame.size:
                shown = frame.without(num_hidden) if num_hidden > 0 else frame
                yield write_frame(shown, write_id(self._request_id, self._places))


def write_frame(frame: Frame, event_id: str | None = None) -> bytes:
    lines = b"" if event_id is None else b"id: %s\n" % event_id.encode()
    if frame.event is not None:
        lines += b"event: %s\n" % frame.event.encode()
    return lines + b"data: %s\n\n" % msgspec.json.encode(frame.data)


def write_id(request_id: str, places: Mapping[int, Place]) -> str:
    shown = (
        f"{index}:{place.token}:{place.part}" + (f".{place.state}" if place.state else "")
        for index, place in sorted(places.items())
    )
    return f"{request_id}:{';'.join(shown)}"


def read_id(text: str) -> tuple[str, dict[int, Place]]:
    """The request and its places. RequestError if it is not what `write_id` writes."""
    request_id, _, rest = text.partition(":")
    found = [_PLACE.fullmatch(part) for part in rest.split(";")] if len(text) <= _MAX_ID_LENGTH else [None]
    places = {int(match[1]): Place(int(match[2]), int(match[3]), match[4] or "") for match in found if match}
    if len(places) != len(found):
        raise RequestError("Last-Event-ID", "not an id that this server gave")
    return request_id, places
