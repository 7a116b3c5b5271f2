"""Constraints of every kind, K2's tool-call form, and states that depend on the tokens alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from k2dist.errors import RequestError
from k2dist.grammar import Grammars, GrammarState, answer_constraint
from k2dist.messages import (
    CallableTool,
    ChatMessage,
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    ToolCalls,
)
from k2dist.text.chat import Chat, ToolChoice
from k2dist.text.tokenizer import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    Tokenizer,
    end_token_ids,
)
from tests.grammar.conftest import allowed, walk

CITY = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
WEATHER = CallableTool(name="get_weather", parameters=CITY)
WEEK = CallableTool(name="get_week")
MARKS = (SECTION_BEGIN, CALL_BEGIN, CALL_ARGUMENTS, CALL_END, SECTION_END)


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Marks by their id, text byte by byte."""
    return [i for part in parts for i in ([tokenizer.special_id(part)] if part in MARKS else part.encode())]


def call(name: str, arguments: str) -> tuple[str, ...]:
    return CALL_BEGIN, name, CALL_ARGUMENTS, arguments, CALL_END


def accepts(tokenizer: Tokenizer, grammars: Grammars, constraint: Constraint, *parts: str) -> bool:
    """Whether exactly this is a whole answer."""
    state = grammars.begin(constraint)
    for token_id in ids_of(tokenizer, *parts):
        if token_id not in allowed(grammars, state):
            return False
        state.advance(token_id)
    ends = end_token_ids(tokenizer, None)
    may_end = ends <= set(allowed(grammars, state))
    assert may_end == state.is_accepting
    return may_end


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Regex(pattern=r"[a-c]{2}/\d"), ["ab/7"], ["ab", "abc/7", "xab/7", "ab/7 "]),
        (Regex(pattern="(?i:ja|nein)?"), ["", "JA", "nein"], ["j", "janein"]),
        (Choice(choices=("yes", "no", 'a "q" \\ ä\n')), ["yes", "no", 'a "q" \\ ä\n'], ["", "y", "yesno"]),
        (Choice(choices=("a", "ab")), ["a", "ab"], ["b", "abc"]),
        (Lark(grammar='start: "(" start ")" | "x"'), ["x", "((x))"], ["((x)", "()"]),
        (Lark(grammar='start: "n=" %json {"type": "integer"}'), ["n=12"], ["n=x"]),
        (JsonObject(), ["{}", '{"a": [1, null]}'], ["[]", "1", '{"a" 1}']),
        (JsonSchema(schema='{"enum": ["ä", 1]}'), ['"ä"', "1"], ["a", "2"]),
    ],
)  # fmt: skip
def test_each_kind_lets_through_what_it_says(
    constraint: Constraint,
    good: list[str],
    bad: list[str],
    bytes_tokenizer: Tokenizer,
    bytes_grammars: Grammars,
) -> None:
    assert [text for text in good if not accepts(bytes_tokenizer, bytes_grammars, constraint, text)] == []
    assert [text for text in bad if accepts(bytes_tokenizer, bytes_grammars, constraint, text)] == []


def test_an_answer_may_call_or_not(bytes_tokenizer: Tokenizer, bytes_grammars: Grammars) -> None:
    auto = ToolCalls(tools=(WEATHER, WEEK))
    weather = call("functions.get_weather:0", '{"city": "Ulm"}')
    good = [
        ("Just <text>, {with} \u00e4.\n",),
        ("",),
        (SECTION_BEGIN, *weather, SECTION_END),
        ("Let me look. ", SECTION_BEGIN, *weather, *call("functions.get_week:1", "{}"), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_week:12", '{"any": [1]}'), SECTION_END),
    ]
    bad = [
        (SECTION_BEGIN, SECTION_END),
        (SECTION_BEGIN, *weather),
        (SECTION_BEGIN, *weather, SECTION_END, "and text"),
        (SECTION_BEGIN, *weather, SECTION_END, SECTION_BEGIN, *weather, SECTION_END),
        (CALL_BEGIN, "functions.get_weather:0"),
        (SECTION_BEGIN, *call("functions.get_wether:0", "{}"), SECTION_END),
        (SECTION_BEGIN, *call("get_weather:0", '{"city": "Ulm"}'), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_weather", '{"city": "Ulm"}'), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_weather:00", '{"city": "Ulm"}'), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_weather:0", "{}"), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_weather:0", '{"city": 3}'), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_week:0", "[]"), SECTION_END),
        (SECTION_BEGIN, *call("functions.get_week:0", ""), SECTION_END),
    ]
    assert [parts for parts in good if not accepts(bytes_tokenizer, bytes_grammars, auto, *parts)] == []
    assert [parts for parts in bad if accepts(bytes_tokenizer, bytes_grammars, auto, *parts)] == []


def test_text_is_free_of_all_control_tokens_but_the_mark_of_calls(
    bytes_tokenizer: Tokenizer, bytes_grammars: Grammars
) -> None:
    ids = set(allowed(bytes_grammars, bytes_grammars.begin(ToolCalls(tools=(WEATHER,)), b"so ")))
    special = {token_id for token_id in ids if bytes_tokenizer.is_special(token_id)}
    assert special == {bytes_tokenizer.special_id(SECTION_BEGIN), *end_token_ids(bytes_tokenizer, None)}
    assert ids >= {*range(0x20, 0x7F)}


def test_a_call_is_forced(bytes_tokenizer: Tokenizer, bytes_grammars: Grammars) -> None:
    required = ToolCalls(tools=(WEATHER, WEEK), is_required=True, max_calls=1)
    week = call("functions.get_week:0", "{}")
    assert accepts(bytes_tokenizer, bytes_grammars, required, SECTION_BEGIN, *week, SECTION_END)
    assert not accepts(bytes_tokenizer, bytes_grammars, required, "text")
    assert not accepts(bytes_tokenizer, bytes_grammars, required, "")
    assert not accepts(bytes_tokenizer, bytes_grammars, required, SECTION_BEGIN, *week, *week, SECTION_END)


def test_an_answer_calls_or_is_json(bytes_tokenizer: Tokenizer, bytes_grammars: Grammars) -> None:
    for text in (
        JsonObject(),
        Lark(grammar='start: "{" "}"'),
        Choice(choices=("{}",)),
        Regex(pattern=r"\{\}"),
    ):
        both = ToolCalls(tools=(WEEK,), text=text)
        section = (SECTION_BEGIN, *call("functions.get_week:0", "{}"), SECTION_END)
        assert accepts(bytes_tokenizer, bytes_grammars, both, "{}")
        assert accepts(bytes_tokenizer, bytes_grammars, both, *section)
        assert not accepts(bytes_tokenizer, bytes_grammars, both, "hello")
        assert not accepts(bytes_tokenizer, bytes_grammars, both, "{}", *section)


@pytest.mark.parametrize("name", ["a", "get-weather.v2", "функция", 'say "hi"', "a:1", "a\\b", "x" * 256])
def test_names_are_taken_to_the_letter(
    name: str, bytes_tokenizer: Tokenizer, bytes_grammars: Grammars
) -> None:
    tools = ToolCalls(tools=(CallableTool(name=name),), is_required=True)
    assert accepts(
        bytes_tokenizer, bytes_grammars, tools, SECTION_BEGIN, *call(f"functions.{name}:3", "{}"), SECTION_END
    )


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ((), "0 tools"),
        (tuple(CallableTool(name=str(i)) for i in range(129)), "129 tools"),
        ((WEEK, WEATHER, WEEK), "'get_week' is declared 2 times"),
        ((CallableTool(name=""),), "no name"),
        ((CallableTool(name=" a"),), "no name"),
        ((CallableTool(name="a\n"),), "no name"),
        ((CallableTool(name="x" * 257),), "no name"),
        ((CallableTool(name="f", parameters='{"type": "array"}'),), "f: parameters: type"),
    ],
)
def test_tools_that_cannot_be_called_are_refused(
    tools: tuple[CallableTool, ...], words: str, grammars: Grammars
) -> None:
    with pytest.raises(RequestError, match=words):
        grammars.check(ToolCalls(tools=tools))


@pytest.mark.parametrize(
    "constraint",
    [
        Regex(pattern="(a"),
        Regex(pattern="(?=a)"),
        Regex(pattern="\ud800"),
        Choice(choices=("a", "\ud800")),
        Lark(grammar="start: b"),
        Lark(grammar=""),
        Lark(grammar="start: %json"),
        Lark(grammar="start: %json {"),
        Lark(grammar='start: %json {"multipleOf": 1000003}'),
        Lark(grammar='start: "a" %json {} | %json {"x-guidance": {"lenient": true}, "not": {}}'),
        Choice(choices=()),
    ],
)
def test_broken_grammars_are_refused(constraint: Constraint, grammars: Grammars) -> None:
    with pytest.raises(RequestError, match="cannot be enforced") as caught:
        grammars.check(constraint)
    assert caught.value.field in ("regex", "lark", "choice")


CONSTRAINTS = [
    JsonObject(),
    ToolCalls(tools=(WEATHER, WEEK), is_required=True),
    ToolCalls(tools=(WEATHER, WEEK), text=JsonSchema(schema=CITY)),
    Regex(pattern="(ab|a|bc){3,9}c?"),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: type(c).__name__)
def test_a_state_is_made_again_from_its_tokens(
    constraint: Constraint, tokenizer: Tokenizer, grammars: Grammars, seed: int
) -> None:
    """Each prefix of an answer, taken by a new state of another compiler, gives the mask that it gave."""
    seen: list[list[int]] = []
    taken = walk(tokenizer, grammars, grammars.begin(constraint), random.Random(seed), look=seen.append)
    others = Grammars(tokenizer, end_token_ids(tokenizer, None))
    for length in range(0, len(taken) + 1, 1 + len(taken) // 20):
        assert allowed(others, others.begin(constraint, taken[:length])) == seen[length]


def test_outputs_of_one_grammar_do_not_meet(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """32 at a time, in threads, each as it is alone."""
    constraint = CONSTRAINTS[1]

    def one(number: int) -> list[int]:
        return walk(tokenizer, grammars, grammars.begin(constraint), random.Random(number))

    alone = [one(number) for number in range(32)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(32))) == alone


def test_threads_make_the_masks_of_one(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    """Many states at once, some at their end and one stuck: each gets the mask that it makes by itself."""
    by_threads = Grammars(tokenizer, end_token_ids(tokenizer, None), num_threads=3)
    draw = random.Random(seed)
    prefixes = [
        (constraint, taken[: draw.randrange(len(taken) + 1)])
        for constraint in CONSTRAINTS
        for taken in (walk(tokenizer, grammars, grammars.begin(constraint), draw) for _ in range(5))
    ]
    prefixes += [(CONSTRAINTS[3], [*b"aaa", *end_token_ids(tokenizer, None)]), (CONSTRAINTS[3], [*b"x"])]
    states = [by_threads.begin(*prefix) for prefix in prefixes]
    masks = np.zeros((len(states), by_threads.mask_bytes), dtype=np.uint8)
    by_threads.masks_into(states, masks)
    alone = np.zeros_like(masks)
    for prefix, mask in zip(prefixes, alone, strict=True):
        grammars.begin(*prefix).mask_into(mask)
    assert (masks == alone).all()
    assert [bool(state.error) for state in states] == [False] * 21 + [True]


def test_a_grammar_worn_by_many_outputs_serves_the_next(
    bytes_tokenizer: Tokenizer, bytes_grammars: Grammars, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """They share what its lexer knows, which is bounded. Masks do not depend on what others have added."""
    monkeypatch.setattr("k2dist.grammar.grammars._MAX_LEXER_STATES", 100)
    bounded = Grammars(bytes_tokenizer, end_token_ids(bytes_tokenizer, None))
    constraint = Regex(pattern="[ab]*a[ab]{30}")
    draw = random.Random(seed)
    kept = []
    for _ in range(6):
        state, twin = bounded.begin(constraint), bytes_grammars.begin(constraint)
        for _ in range(60):
            assert allowed(bounded, state) == allowed(bytes_grammars, twin)
            token_id = draw.choice(b"ab")
            state.advance(token_id)
            twin.advance(token_id)
        kept.append(bounded._compiled(constraint))
    assert len({id(matcher) for matcher in kept}) > 1, "none was worn"


def test_slices_of_the_vocabulary_change_no_mask(
    tokenizer: Tokenizer, grammars: Grammars, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """They are a way to find the same tokens sooner."""
    monkeypatch.setattr("k2dist.grammar.grammars._SLICES", [])
    plain = Grammars(tokenizer, end_token_ids(tokenizer, None))
    draw = random.Random(seed)
    for constraint in (*CONSTRAINTS, Regex(pattern="([a-z]+ ?){1,9}[A-Z]")):
        taken = walk(tokenizer, grammars, grammars.begin(constraint), draw)
        state, twin = grammars.begin(constraint), plain.begin(constraint)
        for token_id in taken:
            assert allowed(grammars, state) == allowed(plain, twin)
            state.advance(token_id)
            twin.advance(token_id)


def test_after_the_end_everything_is_allowed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """A step may run ahead of the token that ends its output; what it samples is dropped."""
    state = grammars.begin(Choice(choices=("a",)), b"a")
    state.advance(min(end_token_ids(tokenizer, None)))
    assert len(allowed(grammars, state)) >= tokenizer.vocab_size
    masks = np.zeros((1, grammars.mask_bytes), dtype=np.uint8)
    grammars.masks_into([state], masks)
    assert (masks == 0xFF).all()
    grammars.masks_into([], masks[:0])
    state.advance(7)
    assert not state.error


def test_a_token_from_elsewhere_is_an_error_and_not_a_crash(grammars: Grammars) -> None:
    state: GrammarState = grammars.begin(Choice(choices=("a",)), b"x")
    assert state.error.startswith("constraint: ")


AUTO = ToolChoice()


def chat(choice: ToolChoice = AUTO, strict: bool | None = None) -> Chat:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}
    if strict is not None:
        function["strict"] = strict
    tools = ({"type": "function", "function": function}, {"type": "function", "function": {"name": "g"}})
    return Chat(messages=(ChatMessage(role="user", content="hi"),), tools=tools, tool_choice=choice)


def test_tool_choices_become_constraints() -> None:
    f = CallableTool(name="f", parameters='{"properties": {"a": {}, "b": {}}, "type": "object"}')  # as shown
    g = CallableTool(name="g")
    json_text = JsonObject()
    assert answer_constraint(chat(), None) == ToolCalls(tools=(f, g))
    assert answer_constraint(chat(), json_text) == ToolCalls(tools=(f, g), text=json_text)
    assert answer_constraint(chat(strict=False), None) == ToolCalls(tools=(CallableTool(name="f"), g))
    assert answer_constraint(chat(ToolChoice(is_parallel=False)), None) == ToolCalls(
        tools=(f, g), max_calls=1
    )
    assert answer_constraint(chat(ToolChoice(mode="none")), json_text) == json_text
    required = ToolCalls(tools=(f, g), is_required=True)
    assert answer_constraint(chat(ToolChoice(mode="required")), json_text) == required
    named = ToolCalls(tools=(g,), is_required=True, max_calls=1)
    assert answer_constraint(chat(ToolChoice(mode="named", name="g")), None) == named
    assert answer_constraint("text", json_text) == json_text
    with pytest.raises(RequestError, match="'h' is not among the tools"):
        answer_constraint(chat(ToolChoice(mode="named", name="h")), None)


def test_k2s_own_vocabulary(k2_tokenizer: Tokenizer) -> None:
    """What K2 writes, token by token; bytes that are certain come in K2's own tokens and in no others."""
    grammars = Grammars(k2_tokenizer, end_token_ids(k2_tokenizer, None))
    state = grammars.begin(ToolCalls(tools=(WEATHER, WEEK)))
    answer = [163595, 163597, 41937, 1150, 21055, 2800, 25, 15, 163598, 8264, 37666, 1289, 414, 4396, 39556]
    forced = {163597: 163595, 41937: 163597, 1150: 41937}
    before = 0
    for token_id in [*k2_tokenizer.encode("Checking. "), *answer, 16934, 163599, 163596, 163586]:
        ids = allowed(grammars, state)
        assert token_id in ids
        if forced.get(token_id) == before:
            assert ids == [token_id]
        state.advance(token_id)
        before = token_id
    assert not state.error
