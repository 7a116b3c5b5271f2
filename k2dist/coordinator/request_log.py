"""What has been accepted and what has been generated for it: the one record behind recovery and `Resume`.

    open ──append──append── ... ──append(last finish)──> ended ──retain_s, or room needed──> forgotten

Positions are (output_index, token_index). A lane's events may be cut differently after a recovery or come
again after a restart: what the log has is dropped by `first_index`, what it lacks is an error, never a hole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import structs

from k2dist.errors import CapacityError, ConfigError, PeerError, RequestError
from k2dist.ids import LaneId, RequestId
from k2dist.messages import Event, FinishReason, Request, TokenLogprob, Usage

_TOKEN_BYTES = 36  # a CPython int beyond the small ones (28) and the reference to it (8)
_LOGPROB_BYTES = 160  # a TokenLogprob with its float
_RIVAL_BYTES = 120  # one (id, logprob) of its `top`
_ENTRY_BYTES = 2048  # the rest of a request: its sampling, ids, lists


@dataclass(slots=True)
class LoggedOutput:
    """One output so far. `logprobs` belong to the tokens from `first_logprob` on, if they were asked for."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of output 0: prompt[1:], as they come
    first_logprob: int = 0  # the tokens before it were known when the request was opened
    finish: FinishReason | None = None
    stop_match: str | int | None = None
    usage: Usage | None = None
    error: str = ""
    retry_can_help: bool = False


@dataclass(slots=True)
class _Entry:
    request: Request
    lane: LaneId
    outputs: list[LoggedOutput]
    num_bytes: int = 0
    ended_s: float | None = None


class RequestLog:
    """Accepted requests within `max_bytes`; an ended one is kept `retain_s`, or less when room is needed.

    A request that goes on counts with all the tokens it may still get, so that `append` never runs out of
    room; it is never dropped. `open` refuses instead. What a lane still knows rebuilds the log by the same
    calls: `open` with what is generated, then `append` of an empty event with the finish of an ended output.
    """

    def __init__(self, *, max_bytes: int, retain_s: float) -> None:
        if max_bytes < _ENTRY_BYTES:
            raise ConfigError(
                f"service.log_bytes={max_bytes}: one request alone needs {_ENTRY_BYTES} or more"
            )
        self._max_bytes = max_bytes
        self._retain_s = retain_s
        self._entries: dict[RequestId, _Entry] = {}
        self._ended: dict[RequestId, None] = {}  # in the order in which they ended
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    @property
    def num_bytes(self) -> int:
        """Estimated memory of all entries."""
        return self._num_bytes

    # -- writing ---------------------------------------------------------------------------------------

    def open(self, request: Request, lane: LaneId, now_s: float) -> None:
        """Record an accepted request; tokens in `request.generated` are in its log from the start.

        The same request again changes nothing; another one with its id raises `RequestError`. `CapacityError`
        if it does not fit beside the requests that go on.
        """
        self.expire(now_s)
        known = self._entries.get(request.request_id)
        if known is not None:
            if structs.replace(known.request, generated={}) != structs.replace(request, generated={}):
                raise RequestError("request_id", f"{request.request_id!r} is in use; take another")
            return
        num_bytes = _bytes_at_most(request)
        self._make_room(num_bytes)
        outputs = [_begin(request.generated.get(index, ())) for index in range(request.num_outputs)]
        self._entries[request.request_id] = _Entry(request, lane, outputs, num_bytes)
        self._num_bytes += num_bytes

    def append(self, event: Event, now_s: float) -> Event | None:
        """Record what is new in `event` and return that; None if nothing is, or the request is not known.

        A gap raises `PeerError`, and so do tokens that contradict the log.
        """
        entry = self._entries.get(event.request_id)
        if entry is None:
            return None
        output = entry.outputs[event.output_index]
        fresh = _without_known(event, output)
        is_empty = not fresh.token_ids and not fresh.prompt_logprobs and fresh.finish is None
        if output.finish is not None or is_empty:
            return None
        output.token_ids += fresh.token_ids
        output.logprobs += fresh.logprobs
        output.prompt_logprobs += fresh.prompt_logprobs
        if fresh.finish is not None:
            output.finish, output.stop_match = fresh.finish, fresh.stop_match
            output.usage, output.error = fresh.usage, fresh.error
            output.retry_can_help = fresh.retry_can_help
            self._note_end(entry, now_s)
        return fresh

    def move(self, request_id: RequestId, lane: LaneId) -> None:
        """The request goes on in another lane."""
        self._entries[request_id].lane = lane

    def expire(self, now_s: float) -> None:
        """Forget requests that ended `retain_s` ago or earlier."""
        for request_id in tuple(self._ended):
            ended_s = self._entries[request_id].ended_s
            assert ended_s is not None
            if ended_s + self._retain_s > now_s:
                break
            self._forget(request_id)

    # -- reading ---------------------------------------------------------------------------------------

    def tail(
        self, request_id: RequestId, output_index: int, from_index: int, *, from_prompt_index: int = 1
    ) -> Event:
        """Tokens from `from_index` on, with output 0 logprobs of the prompt from `from_prompt_index` on, and
        the end if it has come, as one event.

        Its logprobs, if any, are those of its last tokens: `generated` ones come without. `RequestError` for
        a request, an output or a position that the log does not have.
        """
        entry = self._entry(request_id)
        if not 0 <= output_index < len(entry.outputs):
            raise RequestError(
                "output_index", f"{output_index}: the request has {len(entry.outputs)} outputs"
            )
        output = entry.outputs[output_index]
        if not 0 <= from_index <= len(output.token_ids):
            raise RequestError(
                "from_index", f"{from_index}: the output has {len(output.token_ids)} tokens so far"
            )
        prompt_logprobs = tuple(output.prompt_logprobs[from_prompt_index - 1 :])
        return Event(
            request_id=request_id,
            output_index=output_index,
            first_index=from_index,
            token_ids=tuple(output.token_ids[from_index:]),
            logprobs=tuple(output.logprobs[max(from_index - output.first_logprob, 0) :]),
            prompt_logprobs=prompt_logprobs,
            first_prompt_index=from_prompt_index if prompt_logprobs else 0,
            finish=output.finish,
            stop_match=output.stop_match,
            usage=output.usage,
            error=output.error,
            retry_can_help=output.retry_can_help,
        )

    def request(self, request_id: RequestId) -> Request:
        """As it was accepted. `RequestError` if it is not known (any more)."""
        return self._entry(request_id).request

    def lane(self, request_id: RequestId) -> LaneId:
        return self._entry(request_id).lane

    def has_ended(self, request_id: RequestId) -> bool:
        return self._entry(request_id).ended_s is not None

    def num_open(self, lane: LaneId) -> int:
        """Outputs that go on in this lane: its load without asking it."""
        entries = [entry for entry in self._entries.values() if entry.lane == lane]
        return sum(output.finish is None for entry in entries for output in entry.outputs)

    def to_readmit(self, lane: LaneId) -> tuple[Request, ...]:
        """Requests that go on in `lane`, with all tokens so far: what to admit elsewhere when it dies."""
        return tuple(
            structs.replace(entry.request, generated=_generated(entry))
            for entry in self._entries.values()
            if entry.lane == lane and entry.ended_s is None
        )

    # -- room ------------------------------------------------------------------------------------------

    def _entry(self, request_id: RequestId) -> _Entry:
        entry = self._entries.get(request_id)
        if entry is None:
            raise RequestError(
                "request_id", f"{request_id!r} is not known; it may have ended {self._retain_s:g} s ago"
            )
        return entry

    def _note_end(self, entry: _Entry, now_s: float) -> None:
        if all(output.finish is not None for output in entry.outputs):
            entry.ended_s = now_s
            self._ended[entry.request.request_id] = None
            self._num_bytes += _bytes_now(entry) - entry.num_bytes
            entry.num_bytes = _bytes_now(entry)

    def _make_room(self, num_bytes: int) -> None:
        """Forget ended requests, the longest ended first, until `num_bytes` more fit."""
        while self._num_bytes + num_bytes > self._max_bytes and self._ended:
            self._forget(next(iter(self._ended)))
        if self._num_bytes + num_bytes > self._max_bytes:
            raise CapacityError(
                f"the request log holds {self._num_bytes} bytes of requests that go on and this one may need "
                f"{num_bytes} more than service.log_bytes={self._max_bytes} allows; try again later"
            )

    def _forget(self, request_id: RequestId) -> None:
        self._num_bytes -= self._entries.pop(request_id).num_bytes
        del self._ended[request_id]

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert self._num_bytes == sum(entry.num_bytes for entry in self._entries.values()), "bytes miscounted"
        assert self._num_bytes <= self._max_bytes, f"{self._num_bytes} bytes"
        ended = {key for key, entry in self._entries.items() if entry.ended_s is not None}
        assert ended == set(self._ended), "an end is not noted"
        for entry in self._entries.values():
            has_ended = all(output.finish is not None for output in entry.outputs)
            assert has_ended == (entry.ended_s is not None), "an end is not noted"
            assert _bytes_now(entry) <= entry.num_bytes, "a request outgrew what was set aside for it"


def _begin(token_ids: tuple[int, ...]) -> LoggedOutput:
    return LoggedOutput(list(token_ids), first_logprob=len(token_ids))


def _without_known(event: Event, output: LoggedOutput) -> Event:
    """`event` less the tokens and the logprobs of the prompt that the log has."""
    if event.first_index == len(output.token_ids) and not event.prompt_logprobs:
        return event  # all but a few, and this is done for every token
    name = f"request {event.request_id!r} output {event.output_index}"
    num_known = len(output.token_ids) - event.first_index
    if num_known < 0:
        raise PeerError(
            f"{name}: tokens [{len(output.token_ids)}, {event.first_index}) did not arrive from its lane"
        )
    repeated = event.token_ids[:num_known]
    if repeated != tuple(output.token_ids[event.first_index :][: len(repeated)]):
        raise PeerError(f"{name}: its lane sent other tokens than before from {event.first_index} on")
    num_scored = len(output.prompt_logprobs) + 1 - event.first_prompt_index
    if event.prompt_logprobs and num_scored < 0:
        raise PeerError(f"{name}: logprobs of the prompt before {event.first_prompt_index} did not arrive")
    return structs.replace(
        event,
        first_index=event.first_index + len(repeated),
        token_ids=event.token_ids[len(repeated) :],
        logprobs=event.logprobs[len(repeated) :],
        prompt_logprobs=event.prompt_logprobs[num_scored:],
        first_prompt_index=event.first_prompt_index + num_scored if event.prompt_logprobs else 0,
    )


def _generated(entry: _Entry) -> dict[int, tuple[int, ...]]:
    return {index: tuple(output.token_ids) for index, output in enumerate(entry.outputs)}


def _bytes_at_most(request: Request) -> int:
    """All that a request can come to, with every output at `max_tokens`."""
    sampling = request.sampling
    token_bytes = _TOKEN_BYTES + _logprob_bytes(sampling.logprobs)
    return (
        _ENTRY_BYTES
        + (_TOKEN_BYTES + _logprob_bytes(sampling.prompt_logprobs)) * len(request.prompt)
        + token_bytes * sampling.max_tokens * request.num_outputs
    )


def _logprob_bytes(num_rivals: int | None) -> int:
    """Of one token's logprob; None: it has none."""
    return 0 if num_rivals is None else _LOGPROB_BYTES + _RIVAL_BYTES * num_rivals


def _bytes_now(entry: _Entry) -> int:
    tokens = len(entry.request.prompt) + sum(len(output.token_ids) for output in entry.outputs)
    logprobs = [one for output in entry.outputs for one in (*output.logprobs, *output.prompt_logprobs)]
    rivals = sum(len(logprob.top) for logprob in logprobs)
    return _ENTRY_BYTES + _TOKEN_BYTES * tokens + _LOGPROB_BYTES * len(logprobs) + _RIVAL_BYTES * rivals
