"""The log has every token once and in order, within its bytes, until nobody can ask for it any more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from k2dist.coordinator import RequestLog
from k2dist.errors import CapacityError, ConfigError, PeerError, RequestError
from k2dist.messages import Event, FinishReason, Request, Sampling, TokenLogprob, Usage

TOKENS = (11, 12, 13, 14, 15)


def request(
    name: str = "r", *, num_outputs: int = 1, max_tokens: int = 8, generated=None, **sampling
) -> Request:
    return Request(
        request_id=name,
        prompt=(1, 2),
        num_outputs=num_outputs,
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        generated=generated or {},
    )


def delta(first: int, end: int, *, name: str = "r", output: int = 0, finish=None) -> Event:
    return Event(
        request_id=name,
        output_index=output,
        first_index=first,
        token_ids=TOKENS[first:end],
        finish=finish,
        usage=Usage(prompt_tokens=2, completion_tokens=end) if finish else None,
    )


def log_with(*requests: Request, max_bytes: int = 1_000_000) -> RequestLog:
    log = RequestLog(max_bytes=max_bytes, retain_s=60.0)
    for each in requests:
        log.open(each, 0, 0.0)
    return log


def test_a_tail_is_what_came_from_its_position_on() -> None:
    log = log_with(request())
    log.append(delta(0, 2), 1.0)
    log.append(delta(2, 5, finish=FinishReason.LENGTH), 2.0)
    for start in range(6):
        tail = log.tail("r", 0, start)
        assert (tail.first_index, tail.token_ids, tail.finish) == (start, TOKENS[start:], FinishReason.LENGTH)
    assert log.tail("r", 0, 5).usage == Usage(prompt_tokens=2, completion_tokens=5)


def test_what_the_log_has_is_dropped_and_the_rest_is_passed_on() -> None:
    log = log_with(request())
    assert log.append(delta(0, 2), 1.0) == delta(0, 2)
    assert log.append(delta(0, 2), 1.0) is None
    assert log.append(delta(1, 4), 1.0) == delta(2, 4)
    assert log.append(delta(0, 5, finish=FinishReason.STOP), 1.0) == delta(4, 5, finish=FinishReason.STOP)
    assert log.append(delta(4, 5, finish=FinishReason.STOP), 1.0) is None, "it had ended"


def test_logprobs_are_cut_with_their_tokens() -> None:
    log = log_with(request(logprobs=0))
    logprobs = tuple(TokenLogprob(token_id=token, logprob=-float(token)) for token in TOKENS)
    log.append(
        Event(request_id="r", output_index=0, first_index=0, token_ids=TOKENS[:3], logprobs=logprobs[:3]), 1.0
    )
    fresh = log.append(
        Event(request_id="r", output_index=0, first_index=1, token_ids=TOKENS[1:], logprobs=logprobs[1:]), 1.0
    )
    assert fresh is not None
    assert (fresh.token_ids, fresh.logprobs) == (TOKENS[3:], logprobs[3:])
    assert log.tail("r", 0, 1).logprobs == logprobs[1:]


def scored(first: int, end: int, *, num_tokens: int = 0) -> Event:
    """Logprobs of prompt tokens [first, end), which are their own numbers."""
    return Event(
        request_id="r",
        output_index=0,
        first_index=0,
        token_ids=TOKENS[:num_tokens],
        prompt_logprobs=tuple(TokenLogprob(token_id=i, logprob=-1.0) for i in range(first, end)),
        first_prompt_index=first,
    )


def test_logprobs_of_the_prompt_are_there_once_whatever_a_lane_repeats() -> None:
    log = log_with(structs.replace(request(prompt_logprobs=0), prompt=tuple(range(9))))
    assert log.append(scored(1, 4), 1.0) == scored(1, 4)
    assert log.append(scored(1, 4), 1.0) is None
    assert log.append(scored(1, 6), 1.0) == scored(4, 6), "a recovery begins anew"
    with pytest.raises(PeerError, match="logprobs of the prompt before 8 did not arrive"):
        log.append(scored(8, 9), 1.0)
    assert log.append(scored(6, 9, num_tokens=1), 1.0) == scored(6, 9, num_tokens=1)
    assert log.tail("r", 0, 0) == scored(1, 9, num_tokens=1)
    assert log.tail("r", 0, 0, from_prompt_index=5) == scored(5, 9, num_tokens=1)
    assert log.tail("r", 0, 0, from_prompt_index=9) == delta(0, 1)
    log.check()


def test_logprobs_of_the_prompt_count_as_memory() -> None:
    bare, full = log_with(request()), log_with(request(prompt_logprobs=20))
    assert full.num_bytes > bare.num_bytes + 20 * 100
    full.append(scored(1, 2), 1.0)
    full.append(delta(0, 5, finish=FinishReason.STOP), 1.0)
    full.check()


def test_a_gap_is_an_error() -> None:
    log = log_with(request())
    log.append(delta(0, 2), 1.0)
    with pytest.raises(PeerError, match=r"request 'r' output 0: tokens \[2, 3\) did not arrive"):
        log.append(delta(3, 5), 1.0)
    log.append(delta(2, 5), 1.0)


def test_a_lane_cannot_change_what_was_said() -> None:
    log = log_with(request())
    log.append(delta(0, 3), 1.0)
    with pytest.raises(PeerError, match="sent other tokens than before from 1 on"):
        log.append(Event(request_id="r", output_index=0, first_index=1, token_ids=(12, 99, 14)), 1.0)


def test_requests_of_a_dead_lane_come_back_with_their_tokens() -> None:
    log = log_with(request("r", num_outputs=2), request("ended"), request("elsewhere"))
    log.move("elsewhere", 1)
    log.append(delta(0, 3, output=1), 1.0)
    log.append(delta(0, 1, name="ended", finish=FinishReason.STOP), 1.0)
    (again,) = log.to_readmit(0)
    assert (again.request_id, again.generated) == ("r", {0: (), 1: TOKENS[:3]})
    assert (log.num_open(0), log.num_open(1)) == (2, 1)
    log.move("r", 1)
    assert (log.num_open(0), log.num_open(1), log.lane("r")) == (0, 3, 1)


def test_a_lane_rebuilds_the_log() -> None:
    log = log_with(request(generated={0: TOKENS[:3]}, logprobs=0))
    assert log.tail("r", 0, 1).token_ids == TOKENS[1:3]
    logprob = TokenLogprob(token_id=TOKENS[3], logprob=-1.0)
    log.append(
        Event(request_id="r", output_index=0, first_index=3, token_ids=TOKENS[3:4], logprobs=(logprob,)), 1.0
    )
    tail = log.tail("r", 0, 1)
    assert (tail.token_ids, tail.logprobs) == (TOKENS[1:4], (logprob,))
    log.append(Event(request_id="r", output_index=0, first_index=4, finish=FinishReason.ABORT), 1.0)
    assert log.has_ended("r")
    log.check()


def test_a_request_is_opened_once() -> None:
    log = log_with(request())
    log.append(delta(0, 2), 1.0)
    log.open(request(), 0, 2.0)
    log.open(request(generated={0: TOKENS[:2]}), 0, 2.0)
    assert log.tail("r", 0, 0).token_ids == TOKENS[:2]
    with pytest.raises(RequestError, match="'r' is in use"):
        log.open(request(seed=7), 0, 2.0)


@pytest.mark.parametrize(
    ("name", "output_index", "from_index", "message"),
    [
        ("nobody", 0, 0, "request_id: 'nobody'"),
        ("r", 1, 0, "output_index: 1: the request has 1 outputs"),
        ("r", -1, 0, "output_index: -1"),
        ("r", 0, 3, "from_index: 3: the output has 2 tokens so far"),
        ("r", 0, -1, "from_index: -1"),
    ],
)
def test_positions_that_are_not_there_are_refused(
    name: str, output_index: int, from_index: int, message: str
) -> None:
    log = log_with(request())
    log.append(delta(0, 2), 1.0)
    with pytest.raises(RequestError, match=message):
        log.tail(name, output_index, from_index)


def test_an_ended_request_is_kept_for_a_while() -> None:
    log = log_with(request("r"), request("open"))
    log.append(delta(0, 5, finish=FinishReason.LENGTH), 10.0)
    log.expire(69.9)
    assert "r" in log
    log.expire(70.0)
    assert "r" not in log
    assert "open" in log, "what goes on is never forgotten"
    assert log.append(delta(0, 5), 71.0) is None
    log.check()


def test_an_id_is_free_again_when_its_request_is_forgotten() -> None:
    log = log_with(request())
    log.append(delta(0, 5, finish=FinishReason.LENGTH), 10.0)
    with pytest.raises(RequestError, match="'r' is in use"):
        log.open(request(seed=7), 0, 69.9)
    log.open(request(seed=7), 0, 70.0)
    assert log.tail("r", 0, 0).token_ids == ()


def test_room_is_made_by_what_ended_first_and_never_by_what_goes_on() -> None:
    log = RequestLog(max_bytes=8_000, retain_s=60.0)  # three requests of 2,408 bytes
    for name in "abc":
        log.open(request(name), 0, 0.0)
    log.append(delta(0, 5, name="b", finish=FinishReason.STOP), 1.0)
    log.append(delta(0, 5, name="a", finish=FinishReason.STOP), 2.0)
    log.open(request("d"), 0, 3.0)
    log.check()
    assert [name for name in "abcd" if name in log] == ["a", "c", "d"]
    log.open(request("e"), 0, 3.0)
    with pytest.raises(CapacityError, match="log_bytes=8000"):
        log.open(request("f"), 0, 3.0)
    assert [name for name in "abcdef" if name in log] == ["c", "d", "e"]
    log.check()


def test_a_log_without_room_for_one_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="log_bytes=100"):
        RequestLog(max_bytes=100, retain_s=60.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1), st.data())
def test_however_events_are_cut_the_reader_gets_each_token_once(
    starts: list[int], data: st.DataObject
) -> None:
    log, got = log_with(request()), []
    for start in starts:
        first = min(start, len(got))
        end = data.draw(st.integers(first, 5))
        fresh = log.append(delta(first, end, finish=FinishReason.LENGTH if end == 5 else None), 1.0)
        if fresh is not None:
            assert fresh.first_index == len(got)
            got += fresh.token_ids
        assert tuple(got) == TOKENS[: len(got)]
        assert log.tail("r", 0, 0).token_ids == tuple(got)
        log.check()
