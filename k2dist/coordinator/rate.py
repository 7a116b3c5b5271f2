"""How much one API key may ask of the service: two token buckets, with time as an argument.

    level
      cap ┤──╮      ╭──   refills by limit / 60 each second, up to `cap` = one minute's worth
        0 ┤  ╰─╮ ╭──╯
    debt  ┤    ╰─╯        a prompt, and each token of an answer, is paid as it turns out

A request is let in while both levels are above 0, and pays afterwards: how long its answer gets is not known
when it comes, and a prompt larger than a minute's worth could otherwise never be sent. So a level may be
below 0, and refills first. Over any time T a key gets at most limit x (T + 1 minute), and what was under way
at once.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from k2dist.messages import Message

_MINUTE_S = 60.0

PerMinute = Annotated[int, Meta(ge=1)]


class RateLimit(Message, frozen=True, kw_only=True):
    """Of one key; None: no limit."""

    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None  # of prompts, cached ones too, and of answers


class Bucket:
    """One level. Begins full. `now_s` must not go back; if it does, nothing refills."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """0.0 if there is something left, else how long until there is one whole unit."""
        self._refill(now_s)
        return 0.0 if self._level >= 1.0 else (1.0 - self._level) * _MINUTE_S / self._per_minute

    def pay(self, amount: int, now_s: float) -> None:
        self._refill(now_s)
        self._level -= amount

    def change(self, per_minute: int, now_s: float) -> None:
        """Another limit; what was used stays used."""
        self._refill(now_s)
        self._level += per_minute - self._per_minute
        self._per_minute = per_minute

    def _refill(self, now_s: float) -> None:
        passed_s = max(now_s - self._at_s, 0.0)
        self._at_s = max(now_s, self._at_s)
        self._level = min(self._level + passed_s * self._per_minute / _MINUTE_S, float(self._per_minute))

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert self._level <= self._per_minute, f"{self._level} in a bucket of {self._per_minute}"


class Account:
    """What one key has used. `admit` before a request, `pay_tokens` for its prompt and all that comes of
    it."""

    def __init__(self, limit: RateLimit, now_s: float) -> None:
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(limit, now_s)

    def admit(self, now_s: float) -> float:
        """Count one request in and return 0.0; or count nothing, and return after how many seconds to ask
        again."""
        wait_s = max((bucket.wait_s(now_s) for bucket in self._buckets()), default=0.0)
        if wait_s == 0.0 and self._requests is not None:
            self._requests.pay(1, now_s)
        return wait_s

    def pay_tokens(self, num_tokens: int, now_s: float) -> None:
        if self._tokens is not None:
            self._tokens.pay(num_tokens, now_s)

    def change(self, limit: RateLimit, now_s: float) -> None:
        """The key's limit is another one now."""
        self._requests = _changed(self._requests, limit.requests_per_minute, now_s)
        self._tokens = _changed(self._tokens, limit.tokens_per_minute, now_s)

    def _buckets(self) -> tuple[Bucket, ...]:
        return tuple(bucket for bucket in (self._requests, self._tokens) if bucket is not None)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        for bucket in self._buckets():
            bucket.check()


def _changed(bucket: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now_s)
    bucket.change(per_minute, now_s)
    return bucket
