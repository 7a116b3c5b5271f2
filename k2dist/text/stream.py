"""Text while it is being written: bytes to characters, and stop strings, wherever the bytes are cut.

Tokens are byte strings: one may end inside a character or inside a stop string. Both classes hold back
exactly what later bytes could still change, so that what they have given never has to be taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from k2dist.errors import RequestError


class Utf8Stream:
    """Incremental `bytes.decode("utf-8", "replace")`: an unfinished character waits for its other bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that `data` completes; bytes that cannot be UTF-8 become U+FFFD at once."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if an unfinished character is left, else nothing; the stream is then as new."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, slots=True)
class Released:
    """`data`: bytes that belong to the output. `match`: the stop string that came next and ended it."""

    data: bytes
    match: str | None = None


class StopStrings:
    """Finds the first of some stop strings in a byte stream, and keeps it and what follows out of it.

    First means: complete with the fewest bytes; of those that end together, the longest. A client's empty
    stop string raises RequestError. Each byte costs a few operations per stop string, however long it is.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if "" in stops:
            raise RequestError("stop", "an empty string would stop at once; leave it out")
        self._needles = [_Needle(stop) for stop in stops]
        self._held = b""
        self.match: str | None = None

    @property
    def held_bytes(self) -> int:
        """How many bytes at the end could be the beginning of a stop string and wait."""
        return len(self._held)

    def push(self, data: bytes) -> Released:
        """Bytes now known to precede every stop string; after a match, nothing more."""
        if self.match is not None:
            return Released(b"", self.match)
        waiting = self._held + data
        for end, byte in enumerate(data, start=len(self._held) + 1):
            complete = [needle for needle in self._needles if needle.advance(byte)]
            if complete:
                found = max(complete, key=lambda needle: len(needle.data))
                self._held, self.match = b"", found.text
                return Released(waiting[: end - len(found.data)], found.text)
        num_held = max((needle.num_matched for needle in self._needles), default=0)
        cut = len(waiting) - num_held
        self._held = waiting[cut:]
        return Released(waiting[:cut])

    def finish(self) -> bytes:
        """The held bytes: the stream has ended, so they begin no stop string."""
        rest, self._held = self._held, b""
        return rest


@dataclass(frozen=True, slots=True)
class Passed:
    """Output so far: whole tokens, then perhaps the first bytes of the token that a stop string cut."""

    token_ids: tuple[int, ...]
    tail: bytes = b""
    match: str | None = None


class StopGate:
    """`StopStrings` for readers of tokens: a token passes once no byte of it can belong to a stop string.

    Tokens before number `min_tokens` (from 1) pass unread: no stop string can end the output there or begin.
    `token_bytes` is what counts as text, so b"" for special tokens; they keep their place among the others.
    """

    def __init__(
        self, stops: tuple[str, ...], token_bytes: Callable[[int], bytes], *, min_tokens: int = 0
    ) -> None:
        self._stops = StopStrings(stops)
        self._num_unread = max(min_tokens - 1, 0)
        self._token_bytes = token_bytes
        self._waiting: list[int] = []
        self._sent_bytes = 0  # of the first waiting token, already known to be output

    def push(self, token_ids: Iterable[int]) -> Passed:
        """Tokens now known to be output; after a match, nothing more."""
        passed: list[int] = []
        for token_id in token_ids:
            if self._stops.match is not None:
                break
            if self._num_unread:
                self._num_unread -= 1
                passed.append(token_id)
                continue
            self._waiting.append(token_id)
            released = self._stops.push(self._token_bytes(token_id))
            passed += self._pass(len(released.data))
            if released.match is not None:
                return Passed(tuple(passed), self._cut(), released.match)
        return Passed(tuple(passed), match=self._stops.match)

    def finish(self) -> Passed:
        """All tokens that still wait: the output ended without a stop string."""
        self._stops.finish()
        rest, self._waiting = tuple(self._waiting), []
        return Passed(rest, match=self._stops.match)

    def _pass(self, num_bytes: int) -> Sequence[int]:
        """Take the tokens that `num_bytes` more released bytes complete."""
        self._sent_bytes += num_bytes
        taken = 0
        while taken < len(self._waiting):
            size = len(self._token_bytes(self._waiting[taken]))
            if size > self._sent_bytes:
                break
            self._sent_bytes -= size
            taken += 1
        passed, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return passed

    def _cut(self) -> bytes:
        """The bytes before the match of the token it begins in."""
        tail = self._token_bytes(self._waiting[0])[: self._sent_bytes] if self._waiting else b""
        self._waiting = []
        return tail


class _Needle:
    """One stop string: how much of it the stream's end matches (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.data = text.encode("utf-8", "surrogatepass")
        self.num_matched = 0
        self._shorter = [0]  # [n - 1]: the longest proper prefix that also ends the first n bytes
        for end in range(1, len(self.data)):
            self._shorter.append(self._step(self._shorter[-1], self.data[end]))

    def advance(self, byte: int) -> bool:
        """Take one byte; true when the stop string is complete. Not to be called after that."""
        self.num_matched = self._step(self.num_matched, byte)
        return self.num_matched == len(self.data)

    def _step(self, num_matched: int, byte: int) -> int:
        while num_matched and self.data[num_matched] != byte:
            num_matched = self._shorter[num_matched - 1]
        return num_matched + (self.data[num_matched] == byte)
