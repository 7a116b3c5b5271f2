"""Streams against their whole-text twins: UTF-8, stop strings on bytes and on tokens."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2dist.errors import RequestError
from k2dist.text import StopGate, StopStrings, Tokenizer, Utf8Stream

PROPERTY = settings(derandomize=True, deadline=None, max_examples=400)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in pieces, some of them empty; cuts are taken modulo its length."""
    places = sorted(place % (len(data) + 1) for place in cuts)
    return [data[start:end] for start, end in pairwise([0, *places, len(data)])]


cut_places = st.lists(st.integers(0, 200), max_size=8)
mostly_text = st.lists(
    st.sampled_from(["a", "é", "你", "🙂", "\ufeff", "\x00"]).map(str.encode)
    | st.binary(min_size=1, max_size=2),
    max_size=12,
).map(b"".join)


@PROPERTY
@given(data=mostly_text | st.binary(), cuts=cut_places)
@example(data="🙂".encode()[:3] + b"a", cuts=[1, 2, 3])
@example(data=b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf", cuts=list(range(9)))
def test_characters_do_not_depend_on_the_cuts(data: bytes, cuts: list[int]) -> None:
    stream = Utf8Stream()
    text = "".join(map(stream.push, cut(data, cuts))) + stream.finish()
    assert text == data.decode(errors="replace")


@PROPERTY
@given(text=st.text(), cuts=cut_places)
def test_no_whole_character_waits(text: str, cuts: list[int]) -> None:
    stream = Utf8Stream()
    seen, sent = b"", ""
    for piece in cut(text.encode(), cuts):
        seen += piece
        sent += stream.push(piece)
        assert sent == seen.decode(errors="ignore")
    assert stream.finish() == ""


def test_a_finished_stream_is_as_new() -> None:
    stream = Utf8Stream()
    assert stream.push("你".encode()[:2]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push("你".encode()) == "你"


def first_match(data: bytes, stops: tuple[str, ...]) -> tuple[bytes, str | None]:
    """The twin: look at every end in turn, longest stop string first."""
    for end in range(len(data) + 1):
        for stop in sorted(stops, key=lambda s: -len(s.encode())):
            if data[:end].endswith(stop.encode()):
                return data[: end - len(stop.encode())], stop
    return data, None


def could_begin_a_stop(data: bytes, stops: tuple[str, ...]) -> int:
    """The twin: how many bytes at the end begin a stop string."""
    sizes = range(len(data), 0, -1)
    return next((n for n in sizes if any(s.encode().startswith(data[-n:]) for s in stops)), 0)


few_letters = st.text(alphabet="abé", max_size=16)
some_stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4).map(tuple)


@PROPERTY
@given(text=few_letters, stops=some_stops, cuts=cut_places)
@example(text="aabaaab", stops=("aaab",), cuts=[1, 2, 3, 4, 5, 6])
@example(text="abab", stops=("bab", "ab", "b"), cuts=[2])
@example(text="abéab", stops=("béa", "éa"), cuts=[3])
def test_stop_strings_are_found_wherever_the_bytes_are_cut(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    search = StopStrings(stops)
    seen, given_out, match = b"", b"", None
    for piece in cut(text.encode(), cuts):
        released = search.push(piece)
        seen, given_out, match = seen + piece, given_out + released.data, released.match
        expected, expected_match = first_match(seen, stops)
        assert match == search.match == expected_match
        held = could_begin_a_stop(seen, stops) if match is None else 0
        assert given_out == expected[: len(expected) - held]
        assert search.held_bytes == held
    assert (given_out + search.finish(), match) == first_match(text.encode(), stops)


def test_nothing_follows_a_match() -> None:
    search = StopStrings(("\n\n",))
    assert search.push(b"one\n").data == b"one"
    assert search.push(b"\ntwo").match == "\n\n"
    assert search.push(b"three").data == b""
    assert (search.finish(), search.match) == (b"", "\n\n")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^stop: an empty string"):
        StopStrings(("a", ""))


def test_a_long_stop_string_is_searched_in_linear_time() -> None:
    stop = "ab" * 50_000 + "c"
    search = StopStrings((stop,))
    released = search.push(b"ab" * 100_000 + b"c!")
    assert (len(released.data), released.match) == (100_000, stop)


@PROPERTY
@given(
    text=few_letters,
    stops=some_stops,
    sizes=st.lists(st.integers(1, 4), min_size=64, max_size=64),
    per_push=st.integers(1, 5),
    min_tokens=st.integers(0, 4),
)
def test_a_gate_passes_the_same_bytes_in_whole_tokens(
    text: str, stops: tuple[str, ...], sizes: list[int], per_push: int, min_tokens: int
) -> None:
    data = text.encode()
    tokens: list[bytes] = []
    for size in sizes:
        tokens.append(data[:size])
        data = data[size:]
    gate = StopGate(stops, lambda token_id: tokens[token_id], min_tokens=min_tokens)
    ids: list[int] = []
    tail, match = b"", None
    for start in range(0, len(tokens), per_push):
        passed = gate.push(range(start, min(start + per_push, len(tokens))))
        ids += passed.token_ids
        if passed.match is not None:
            assert match is None or (not passed.token_ids and not passed.tail)
            tail, match = tail or passed.tail, passed.match
    ids += gate.finish().token_ids
    unread = b"".join(tokens[: max(min_tokens - 1, 0)])
    expected, expected_match = first_match(text.encode()[len(unread) :], stops)
    assert ids == list(range(len(ids)))
    assert (b"".join(tokens[i] for i in ids) + tail, match) == (unread + expected, expected_match)


def test_specials_are_no_text_and_keep_their_place(small: Tokenizer) -> None:
    mark = small.special_id("<|tool_call_begin|>")
    gate = StopGate((">", "hellos"), small.text_bytes)
    hello, other, s = small.encode("hello")[0], small.encode(" world")[0], small.encode("s")[0]
    assert gate.push([mark]).token_ids == (mark,)
    assert gate.push([hello, mark]).token_ids == ()
    assert gate.push([other]).token_ids == (hello, mark, other)
    assert gate.push([small.encode("h")[0]]).token_ids == ()
    last = gate.push([small.encode("o")[0], hello, s, other])
    assert (last.token_ids, last.tail, last.match) == (
        tuple(small.encode("h") + small.encode("o")),
        b"",
        "hellos",
    )
