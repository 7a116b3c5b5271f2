"""A stream that broke off and was read again: nothing lost, nothing doubled, wherever it broke."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2dist.ids import RequestId
from k2dist.messages import Event, FinishReason, Sampling, TokenLogprob, Usage
from k2dist.service.answer import Answer
from k2dist.service.answer_events import Accepted, AnswerEvent, Delta, PromptLogprobs
from k2dist.service.splice import Splice
from k2dist.service.whole_answer import WholeAnswer
from tests.service.http_clients import WEATHER, two_calls
from tests.service.test_answer import TOKENIZER

TOKENS = two_calls(TOKENIZER, "Größe 😀 then a call.")
ACCEPTED = Accepted(request_id="r", model="m", prompt_tokens=4, num_outputs=2, sampling=Sampling(), lane=0)


def score(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-0.5)


def stream(cuts: Iterable[int]) -> list[AnswerEvent]:
    """Both outputs' events, with the tokens cut at `cuts`; the second output is one half of the first."""
    bounds = sorted({0, len(TOKENS), *(cut for cut in cuts if cut < len(TOKENS))})
    events: list[AnswerEvent] = [ACCEPTED]
    for start in range(1, 4):
        events.append(PromptLogprobs(first_index=start, logprobs=(score(start),)))
    answers = [Answer(TOKENIZER, tools=(WEATHER,)) for _ in range(2)]
    ends = [len(TOKENS), len(TOKENS) // 2]
    for start, end in pairwise(bounds):
        for index, answer in enumerate(answers):
            token_ids = tuple(TOKENS[start : min(end, ends[index])])
            is_last = start < ends[index] <= end
            if token_ids:
                event = Event(
                    request_id=RequestId("r"),
                    output_index=index,
                    first_index=start,
                    token_ids=token_ids,
                    logprobs=tuple(map(score, token_ids)),
                    finish=(FinishReason.STOP if index == 0 else FinishReason.LENGTH) if is_last else None,
                    stop_match=TOKENS[-1] if is_last and index == 0 else None,
                    usage=Usage(completion_tokens=ends[index]) if is_last else None,
                )
                events += answer.push(event)
    return events


def whole(events: Iterable[AnswerEvent]) -> tuple[object, ...]:
    """All that the events say, and that their tokens are gapless."""
    answers, tokens, scores = {0: WholeAnswer(), 1: WholeAnswer()}, {0: [], 1: []}, []
    for event in events:
        if isinstance(event, Accepted):
            continue
        if isinstance(event, PromptLogprobs):
            assert event.first_index == len(scores) + 1
            scores += event.logprobs
            continue
        answers[event.output_index].add(event)
        if isinstance(event, Delta):
            if event.token_ids:
                assert event.first_index == len(tokens[event.output_index])
            tokens[event.output_index] += event.token_ids
            assert [one.token_id for one in event.logprobs] == list(event.token_ids)
    ends = [(a.text, a.tool_calls, a.finished) for a in answers.values()]
    return tokens, ends, scores


@given(
    first=st.sets(st.integers(0, len(TOKENS)), max_size=30),
    second=st.sets(st.integers(0, len(TOKENS)), max_size=30),
    breaks=st.integers(0, 60),
)
def test_wherever_it_breaks_it_is_whole(first: set[int], second: set[int], breaks: int) -> None:
    splice, given_out = Splice(), []
    for event in stream(first)[:breaks]:
        given_out.append(splice.push(event))
    assert splice.has_ended == (breaks >= len(stream(first)))
    splice.again()
    for event in stream(second):
        given_out.append(splice.push(event))
    assert splice.has_ended
    shown = [event for event in given_out if event is not None]
    assert whole(shown) == whole(stream(set()))
    assert sum(isinstance(event, Accepted) for event in shown) == 1


@pytest.mark.parametrize("every", [1, 7])
def test_it_may_break_again_and_again(every: int) -> None:
    splice, shown, pieces = Splice(), [], stream(range(len(TOKENS)))
    for upto in [*range(0, len(pieces), every), len(pieces)]:
        for event in pieces[:upto]:
            shown.append(splice.push(event))
        splice.again()
    assert whole(event for event in shown if event is not None) == whole(pieces)
