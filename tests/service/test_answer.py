"""One output's text and calls do not depend on how its tokens are cut into events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.ids import RequestId
from k2dist.messages import Event, FinishReason, TokenLogprob, Usage
from k2dist.service.answer import PIECE_TOKENS, Answer, OutputEvent
from k2dist.service.answer_events import AnswerEnd, Delta, Failed, Finished, PromptLogprobs
from k2dist.service.whole_answer import WholeAnswer
from k2dist.text.tokenizer import IM_END, K2_SPECIALS, Tokenizer
from tests.service.test_generate import WEATHER, call_tokens

TOKENIZER = Tokenizer([bytes((b,)) for b in range(256)], {256 + i: name for i, name in K2_SPECIALS.items()})
END = TOKENIZER.special_id(IM_END)


def events(
    token_ids: list[int],
    cuts: set[int],
    finish: FinishReason = FinishReason.STOP,
    stop_match: str | int | None = END,
    error: str = "",
    *,
    retry_can_help: bool = False,
) -> list[Event]:
    """The tokens in pieces, cut before these indices; the last piece ends the output."""
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < len(token_ids)), len(token_ids)]
    pieces = [
        Event(
            request_id=RequestId("r"),
            output_index=0,
            first_index=start,
            token_ids=tuple(token_ids[start:end]),
        )
        for start, end in pairwise(bounds)
    ]
    last = Event(
        request_id=RequestId("r"),
        output_index=0,
        first_index=len(token_ids),
        finish=finish,
        stop_match=stop_match,
        usage=Usage(completion_tokens=len(token_ids)),
        error=error,
        retry_can_help=retry_can_help,
    )
    return [*pieces, last]


def test_a_long_tail_comes_in_pieces_that_join_to_it() -> None:
    """100,000 tokens with 20 rivals each would not fit into a message."""
    num_known, num_tokens, num_prompt = 7, 10_000, 9_000
    logprobs = [TokenLogprob(token_id=i % 256, logprob=-float(i)) for i in range(num_tokens)]
    tail = Event(
        request_id=RequestId("r"),
        output_index=0,
        first_index=5,
        token_ids=tuple(i % 256 for i in range(num_tokens)),
        logprobs=tuple(logprobs[num_known:]),
        prompt_logprobs=tuple(logprobs[:num_prompt]),
        first_prompt_index=3,
    )
    shown = Answer(TOKENIZER).push(tail)
    scores = [event for event in shown if isinstance(event, PromptLogprobs)]
    deltas = [event for event in shown if isinstance(event, Delta)]
    assert len(scores) == len(deltas) == 3
    assert [event.first_index for event in scores] == [3, 3 + PIECE_TOKENS, 3 + 2 * PIECE_TOKENS]
    assert [one for event in scores for one in event.logprobs] == logprobs[:num_prompt]
    assert [event.first_index for event in deltas] == [5, 5 + PIECE_TOKENS, 5 + 2 * PIECE_TOKENS]
    assert tuple(i for event in deltas for i in event.token_ids) == tail.token_ids
    assert [len(event.token_ids) - len(event.logprobs) for event in deltas] == [num_known, 0, 0]
    assert tuple(one for event in deltas for one in event.logprobs) == tail.logprobs
    assert all(event.text for event in deltas), "each piece is read by itself"


def read(answer: Answer, pieces: list[Event]) -> list[OutputEvent]:
    return [shown for piece in pieces for shown in answer.push(piece)]


def whole(shown: list[OutputEvent]) -> WholeAnswer:
    answer = WholeAnswer()
    for event in shown:
        answer.add(event)
    return answer


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 60)))
def test_cuts_change_nothing(cuts: set[int]) -> None:
    token_ids = call_tokens(TOKENIZER, "get_weather", '{"city": "Köln 😀"}')
    answer = whole(read(Answer(TOKENIZER, tools=(WEATHER,), first_call=2), events(token_ids, cuts)))
    (call,) = answer.tool_calls
    assert answer.text == "Let me look."
    assert (call.id, call.name) == ("functions.get_weather:0", "get_weather")
    assert call.arguments == '{"city": "Köln 😀"}'
    assert answer.token_ids == token_ids
    assert answer.finished is not None
    assert answer.finished.reason is AnswerEnd.TOOL_CALLS


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 30)), st.integers(0, 12))
def test_a_stop_string_counts_from_min_tokens_on(cuts: set[int], min_tokens: int) -> None:
    text = "one END two END"
    ends_at = text.index("END") + 3 if min_tokens <= text.index("END") + 1 else len(text)
    token_ids = list(text.encode())[:ends_at]
    pieces = events(token_ids, cuts, stop_match="END")
    answer = whole(read(Answer(TOKENIZER, stops=("END",), min_tokens=min_tokens), pieces))
    assert answer.text == ("one " if ends_at < len(text) else "one END two ")


def test_what_was_held_back_comes_with_the_end() -> None:
    pieces = events([*b"see EN"], set(), FinishReason.LENGTH, None)
    shown = read(Answer(TOKENIZER, stops=("END",)), pieces)
    assert [event.text for event in shown if isinstance(event, Delta)] == ["see ", "EN"]
    assert shown[1] == Delta(output_index=0, first_index=6, text="EN")


def test_marks_are_no_text_where_no_tools_were_given() -> None:
    token_ids = call_tokens(TOKENIZER, "f", "{}")
    answer = whole(read(Answer(TOKENIZER), events(token_ids, set())))
    assert answer.text == "Let me look.functions.f:0{}"
    assert not answer.tool_calls
    assert answer.finished is not None
    assert answer.finished.reason is AnswerEnd.STOP


@pytest.mark.parametrize(("retry_can_help", "reason"), [(True, "RANK_LOST"), (False, "INTERNAL")])
def test_an_error_is_the_last_event_and_says_why(retry_can_help: bool, reason: str) -> None:
    given = events([*b"ab"], set(), FinishReason.ERROR, None, "it broke", retry_can_help=retry_can_help)
    shown = read(Answer(TOKENIZER), given)
    assert [type(event) for event in shown] == [Delta, Failed]
    assert shown[-1] == Failed(output_index=0, reason=reason, message="it broke", retryable=retry_can_help)


def test_an_aborted_answer_keeps_its_text() -> None:
    shown = read(Answer(TOKENIZER), events([*b"ab"], set(), FinishReason.ABORT, None))
    assert isinstance(shown[-1], Finished)
    assert shown[-1].reason is AnswerEnd.ABORTED
    assert whole(shown).text == "ab"
