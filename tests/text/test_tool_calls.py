"""The tool-call parser: regular answers, every deviation seen in the field, and any cut of any tokens."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.errors import RequestError
from k2dist.messages import ChatMessage, ToolCall
from k2dist.text import (
    Answer,
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    ContentDelta,
    Part,
    Tokenizer,
    ToolCallParser,
    collect,
    encode_chat,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300)

# Short for the marks, in the answers below; the first five are the parser's, the last two are nothing to it.
SHORT = {
    "⟦": "<|tool_calls_section_begin|>",
    "⟧": "<|tool_calls_section_end|>",
    "«": "<|tool_call_begin|>",
    "→": "<|tool_call_argument_begin|>",
    "»": "<|tool_call_end|>",
    "¶": "<|im_end|>",
    "§": "<|im_middle|>",
}
MISSPELT = "<|tool_call_section_begin|>"
CITY = {"function": {"name": "get_weather", "parameters": {"properties": {"city": {}}, "required": ["city"]}}}
ADD = {"function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]}}}
NOW = {"function": {"name": "now"}}

Ids = Callable[[str], list[int]]


@pytest.fixture(scope="session")
def ids(small: Tokenizer) -> Ids:
    """Tokens of an answer written with the short marks; all else in it is text."""

    def encode(answer: str) -> list[int]:
        pieces = re.split(f"([{''.join(SHORT)}])", answer)
        return [
            i
            for piece in pieces
            for i in ([small.special_id(SHORT[piece])] if piece in SHORT else small.encode(piece))
        ]

    return encode


def parse(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    tools: list[dict[str, object]] | None = None,
    *,
    is_cut: bool = False,
    cuts: Sequence[int] = (),
    first_call: int = 0,
) -> list[Part]:
    """All parts, the tokens pushed in the pieces that `cuts` make."""
    parser = ToolCallParser(tokenizer, tools, first_call=first_call)
    places = sorted(place % (len(token_ids) + 1) for place in cuts)
    parts: list[Part] = []
    for start, end in pairwise([0, *places, len(token_ids)]):
        parts += parser.push(token_ids[start:end])
    parts += parser.finish(is_cut=is_cut)
    check(parts, num_calls=parser.num_calls, is_cut=is_cut)
    return parts


def check(parts: Sequence[Part], *, num_calls: int, is_cut: bool) -> None:
    """What holds for the parts of any answer: content first, calls one after the other, ids all different."""
    open_call: int | None = None
    seen_ids: list[str] = []
    for part in parts:
        match part:
            case ContentDelta(text):
                assert text
                assert not seen_ids, "content after a call"
            case CallStarted(index, call_id, _):
                assert (open_call, index) == (None, len(seen_ids))
                assert call_id
                open_call = index
                seen_ids.append(call_id)
            case ArgumentsDelta(index, text):
                assert text
                assert index == open_call
            case CallEnded(index, was_cut):
                assert index == open_call
                assert not was_cut or (is_cut and part is parts[-1])
                open_call = None
    assert open_call is None
    assert len(set(seen_ids)) == len(seen_ids) == num_calls


def call(call_id: str, name: str, arguments: str = "{}") -> ToolCall:
    return ToolCall(id=call_id, name=name, arguments=arguments)


F0 = call("functions.f:0", "f", '{"a":1}')
G1 = call("functions.g:1", "g", '{"b":2}')

# name, answer, content, calls
DEVIATIONS: list[tuple[str, str, str, tuple[ToolCall, ...]]] = [
    ("no call", "Hello.¶", "Hello.", ()),
    ("two calls", 'Hm.⟦«functions.f:0→{"a":1}»«functions.g:1→{"b":2}»⟧¶', "Hm.", (F0, G1)),
    ("content is verbatim", " a\n ⟦«functions.f:0→{}»⟧", " a\n ", (call("functions.f:0", "f"),)),
    ("spaces round ids and arguments", '⟦\n« functions.f:0\n→\n {"a":1} \n»\n⟧', "", (F0,)),
    (
        "spaces inside arguments",
        '⟦«functions.f:0→{"a" : " 1 "}»⟧',
        "",
        (call("functions.f:0", "f", '{"a" : " 1 "}'),),
    ),
    ("dash and dot in names", "⟦«functions.a-b.c_d:12→{}»⟧", "", (call("functions.a-b.c_d:12", "a-b.c_d"),)),
    ("colon in a name", "⟦«functions.ns:f:3→{}»⟧", "", (call("functions.ns:f:3", "ns:f"),)),
    (
        "a tool called functions",
        "⟦«functions.functions:0→{}»⟧",
        "",
        (call("functions.functions:0", "functions"),),
    ),
    ("no prefix", '⟦«f:0→{"a":1}»⟧', "", (call("f:0", "f", '{"a":1}'),)),
    ("no counter", '⟦«functions.f→{"a":1}»«g→{"b":2}»⟧', "", (F0, G1)),
    (
        "an id twice",
        "⟦«functions.f:0→{}»«functions.f:0→{}»⟧",
        "",
        (call("functions.f:0", "f"), call("functions.f:1", "f")),
    ),
    (
        "no counter, the next one used",
        "⟦«functions.f:1→{}»«functions.f→{}»⟧",
        "",
        (call("functions.f:1", "f"), call("functions.f:2", "f")),
    ),
    (
        "empty arguments",
        "⟦«functions.f:0→»«functions.g:1→ \n»⟧",
        "",
        (call("functions.f:0", "f"), call("functions.g:1", "g")),
    ),
    (
        "no arguments at all",
        "⟦«functions.f:0»«functions.g:1⟧",
        "",
        (call("functions.f:0", "f"), call("functions.g:1", "g")),
    ),
    ("no end of a call", '⟦«functions.f:0→{"a":1}«functions.g:1→{"b":2}⟧', "", (F0, G1)),
    ("no end of the section", 'Hm.⟦«functions.f:0→{"a":1}»¶', "Hm.", (F0,)),
    ("no end of anything", '⟦«functions.f:0→{"a":1}¶', "", (F0,)),
    ("no beginning of the section", 'Hm.«functions.f:0→{"a":1}»¶', "Hm.", (F0,)),
    ("no beginning of a call", '⟦functions.f:0→{"a":1}»functions.g:1→{"b":2}»⟧', "", (F0, G1)),
    ("a second section", '⟦«functions.f:0→{"a":1}»⟧ and ⟦«functions.g:1→{"b":2}»⟧', "", (F0, G1)),
    ("a call after the section", '⟦«functions.f:0→{"a":1}»⟧«functions.g:1→{"b":2}»', "", (F0, G1)),
    ("text between and after", '⟦one«functions.f:0→{"a":1}»two⟧three»four¶', "", (F0,)),
    ("an empty section", "Hm.⟦⟧ more", "Hm.", ()),
    ("a call with no id", "⟦«⟧", "", ()),
    ("stray marks in content", "a»b→c⟧d§e", "abcde", ()),
    ("a stray mark in arguments", '⟦«functions.f:0→{"a"→:1}»⟧', "", (F0,)),
    ("misspelt section", MISSPELT + '«functions.f:0→{"a":1}»<|tool_call_section_end|>¶', "", (F0,)),
    ("misspelt section and spaces", f'Hm.{MISSPELT}\n ⟦«functions.f:0→{{"a":1}}»⟧', "Hm.", (F0,)),
    ("misspelt section as content", f"Write {MISSPELT}\n!", f"Write {MISSPELT}\n!", ()),
    ("misspelt section at the end", f"a{MISSPELT} ", f"a{MISSPELT} ", ()),
    ("half a misspelt section", "a<|tool_call⟦⟧", "a<|tool_call", ()),
    ("misspelt section twice", f'{MISSPELT}{MISSPELT}«functions.f:0→{{"a":1}}»', MISSPELT, (F0,)),
    ("encoded twice", r'⟦«functions.f:0→ "{\"a\":1}" »⟧', "", (F0,)),
    ("only a string", r'⟦«functions.f:0→"\"x\""»⟧', "", (call("functions.f:0", "f", r'"\"x\""'),)),
    ("not JSON", "⟦«functions.f:0→{a»⟧", "", (call("functions.f:0", "f", "{a"),)),
    ("a counter without tools", "⟦«0→{}»⟧", "", (call("0", ""),)),
]


@pytest.mark.parametrize(
    ("answer", "content", "calls"), [row[1:] for row in DEVIATIONS], ids=[row[0] for row in DEVIATIONS]
)
def test_what_the_model_writes_is_read(
    small: Tokenizer, ids: Ids, answer: str, content: str, calls: tuple[ToolCall, ...]
) -> None:
    tokens = ids(answer)
    whole = collect(parse(small, tokens))
    assert whole == Answer(content, calls)
    assert collect(parse(small, tokens, cuts=range(len(tokens)))) == whole
    assert all(collect(parse(small, tokens, cuts=[place])) == whole for place in range(len(tokens)))


CUT: list[tuple[str, str, list[Part]]] = [
    ("in content", "Hel", [ContentDelta("Hel")]),
    ("in an id", "⟦«functions.f:1", []),
    ("before arguments", "⟦«functions.f:0→", [CallStarted(0, "functions.f:0", "f"), CallEnded(0, True)]),
    (
        "in arguments",
        '⟦«functions.f:0→{"a": ',
        [CallStarted(0, "functions.f:0", "f"), ArgumentsDelta(0, '{"a":'), CallEnded(0, True)],
    ),
    (
        "in a string that may be an object",
        r'⟦«functions.f:0→"{\"a',
        [CallStarted(0, "functions.f:0", "f"), ArgumentsDelta(0, r'"{\"a'), CallEnded(0, True)],
    ),
    (
        "between calls",
        "⟦«functions.f:0→{}»«",
        [CallStarted(0, "functions.f:0", "f"), ArgumentsDelta(0, "{}"), CallEnded(0)],
    ),
    ("in a misspelt section", "a" + MISSPELT[:9], [ContentDelta("a"), ContentDelta(MISSPELT[:9])]),
]


@pytest.mark.parametrize(("answer", "parts"), [row[1:] for row in CUT], ids=[row[0] for row in CUT])
def test_an_answer_cut_short_keeps_what_it_has(
    small: Tokenizer, ids: Ids, answer: str, parts: list[Part]
) -> None:
    assert parse(small, ids(answer), is_cut=True) == parts


def test_arguments_are_sent_as_they_come_and_the_name_before_them(small: Tokenizer, ids: Ids) -> None:
    parser = ToolCallParser(small)
    assert parser.push(ids("Hm.⟦«functions.f")) == (ContentDelta("Hm."),)
    assert parser.push(ids(":0")) == ()
    assert parser.push(ids("→")) == (CallStarted(0, "functions.f:0", "f"),)
    assert parser.push(ids('{"a":')) == (ArgumentsDelta(0, '{"a":'),)
    assert parser.push(ids(" ")) == ()
    assert parser.push(ids("1}")) == (ArgumentsDelta(0, " 1}"),)
    assert parser.push(ids("»«functions.g:1→")) == (CallEnded(0), CallStarted(1, "functions.g:1", "g"))
    assert parser.push(ids("⟧")) == (ArgumentsDelta(1, "{}"), CallEnded(1))
    assert parser.finish(is_cut=False) == ()
    assert parser.num_calls == 2


@pytest.mark.parametrize(
    ("head", "arguments", "expected"),
    [
        ("0", '{"city":"Rome"}', call("functions.get_weather:0", "get_weather", '{"city":"Rome"}')),
        (":4", '{"b":1,"a":2}', call("functions.add:4", "add", '{"b":1,"a":2}')),
        ("functions.:4", '{"b":1,"a":2}', call("functions.add:4", "add", '{"b":1,"a":2}')),
        ("functions:4", r'"{\"b\":1,\"a\":2}"', call("functions.add:4", "add", '{"b":1,"a":2}')),
        ("", '{"b":1,"a":2}', call("functions.add:7", "add", '{"b":1,"a":2}')),
        ("2", "", call("functions.now:2", "now")),
        ("3", '{"a":1}', call("3", "", '{"a":1}')),
        ("3", "nothing", call("3", "", "nothing")),
        (
            "functions.undeclared:3",
            '{"city":""}',
            call("functions.undeclared:3", "undeclared", '{"city":""}'),
        ),
    ],
)
def test_an_id_without_a_name_takes_the_tool_that_fits(
    small: Tokenizer, ids: Ids, head: str, arguments: str, expected: ToolCall
) -> None:
    tokens = ids(f"⟦«{head}→{arguments}»⟧")
    parts = parse(small, tokens, [CITY, ADD, NOW], first_call=7, cuts=range(len(tokens)))
    assert collect(parts).tool_calls == (expected,)


def test_an_only_tool_needs_no_arguments_to_be_known(small: Tokenizer, ids: Ids) -> None:
    parser = ToolCallParser(small, [CITY])
    assert parser.push(ids("⟦«0→{")) == (
        CallStarted(0, "functions.get_weather:0", "get_weather"),
        ArgumentsDelta(0, "{"),
    )


@pytest.mark.parametrize(
    "tool", [{}, {"function": {}}, {"function": {"name": "f", "parameters": {"required": "a"}}}]
)
def test_a_tool_that_is_none_is_the_clients_fault(small: Tokenizer, tool: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=r"^tools\[1\]: "):
        ToolCallParser(small, [CITY, tool])


def test_a_half_character_ends_with_its_region(small: Tokenizer, ids: Ids) -> None:
    half = small.num_base - 2
    tokens = [half, *ids("⟦«functions.f:0→"), half, *ids("»⟧"), half]
    assert collect(parse(small, tokens)) == Answer("\ufffd", (call("functions.f:0", "f", "\ufffd"),))
    assert collect(parse(small, [half])) == Answer("\ufffd", ())


def test_the_bytes_before_a_stop_string_belong_to_the_region(small: Tokenizer, ids: Ids) -> None:
    parser = ToolCallParser(small)
    assert parser.push([small.num_base - 2]) == ()
    assert parser.push_bytes("你".encode()[2:] + b"!") == (ContentDelta("你!"),)
    assert parser.push(ids("⟦«functions.f:0→")) == (CallStarted(0, "functions.f:0", "f"),)
    assert parser.push_bytes(b"{") == (ArgumentsDelta(0, "{"),)
    assert parser.finish(is_cut=True) == (CallEnded(0, True),)


def test_what_the_template_writes_the_parser_reads(small: Tokenizer) -> None:
    """Also with every mark as text in the arguments: what counts is the token's id."""
    arguments = json.dumps({"city": "".join(SHORT.values()) + " 你"}, ensure_ascii=False)
    message = ChatMessage(
        role="assistant",
        content="One moment.",
        tool_calls=(
            call("functions.get_weather:0", "get_weather", arguments),
            call("functions.now:1", "now"),
        ),
    )
    system = ChatMessage(role="system", content="")
    start = encode_chat(small, [system])
    answer = encode_chat(small, [system, message], add_generation_prompt=False)[len(start) :]
    assert collect(parse(small, answer)) == Answer("One moment.", message.tool_calls)


names = st.from_regex(r"[a-z_][a-z0-9_.\-]{0,6}", fullmatch=True).filter(
    lambda name: name not in ("functions",)
)
spaces = st.text(alphabet=" \t\r\n", max_size=2)
objects = st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.none(), max_size=3)
cut_places = st.lists(st.integers(0, 300), max_size=10)


@PROPERTY
@given(
    content=st.text(max_size=8) | st.sampled_from(["<", "<|tool", "a<|tool_call_section_begin|"]),
    made=st.lists(st.tuples(names, objects, st.booleans(), spaces, spaces, spaces, spaces), max_size=3),
    cuts=cut_places,
)
def test_a_regular_answer_gives_its_content_and_calls_for_every_split(
    small: Tokenizer,
    content: str,
    made: list[tuple[str, dict[str, object], bool, str, str, str, str]],
    cuts: list[int],
) -> None:
    """The twin is the answer's making: nothing of the parser is used for what is expected."""
    mark = {short: small.special_id(name) for short, name in SHORT.items()}
    tokens, expected = small.encode(content), []
    tokens += [mark["⟦"]] if made else []
    for number, (name, value, is_ascii, *pads) in enumerate(made):
        call_id, text = f"functions.{name}:{number}", json.dumps(value, ensure_ascii=is_ascii)
        tokens += [mark["«"], *small.encode(pads[0] + call_id + pads[1])]
        tokens += [mark["→"], *small.encode(pads[2] + text + pads[3]), mark["»"]]
        expected.append(call(call_id, name, text))
    tokens += [mark["⟧"], mark["¶"]] if made else [mark["¶"]]
    assert collect(parse(small, tokens, cuts=cuts)) == Answer(content, tuple(expected))


@PROPERTY
@given(
    answer=st.lists(
        st.sampled_from(
            [
                *SHORT,
                "functions.f:0",
                "get_weather:1",
                "2",
                ":",
                '{"city":1}',
                '"{}"',
                '"',
                " ",
                "x",
                MISSPELT,
            ]
        )
        | st.integers(0, 255),
        max_size=14,
    ),
    cuts=cut_places,
    tools=st.sampled_from([None, [CITY], [CITY, ADD, NOW]]),
    is_cut=st.booleans(),
)
def test_any_tokens_give_the_same_for_every_split(
    small: Tokenizer,
    ids: Ids,
    answer: list[str | int],
    cuts: list[int],
    tools: list[dict[str, object]] | None,
    *,
    is_cut: bool,
) -> None:
    """`check` holds for whatever a model may write; the same parts come whether in one push or in many."""
    tokens = [i for piece in answer for i in (ids(piece) if isinstance(piece, str) else [piece])]
    whole = parse(small, tokens, tools, is_cut=is_cut)
    pieces = parse(small, tokens, tools, is_cut=is_cut, cuts=cuts)
    assert collect(pieces) == collect(whole)
    marks = [part for part in whole if isinstance(part, CallStarted | CallEnded)]
    assert marks == [part for part in pieces if isinstance(part, CallStarted | CallEnded)]
