"""Constrained answers of a model with random weights: valid whenever they end, whatever else goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from k2dist.config import read_architecture
from k2dist.engine import Generated, LocalWorld
from k2dist.engine.feed import Feed
from k2dist.errors import RequestError
from k2dist.ids import RequestId
from k2dist.messages import (
    CallableTool,
    Choice,
    FinishReason,
    JsonSchema,
    Regex,
    Request,
    Sampling,
    ToolCalls,
)
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits
from k2dist.text.tokenizer import CALL_END, SECTION_END, Tokenizer
from k2dist.text.tool_calls import ToolCallParser, collect
from tests.grammar.conftest import CASES, Case, check_valid

PROMPT = list(b"Call it.")
NAMES = ("weather", "edit_file", "tree", "expression", "json_value", "anyof_tagged", "map_and_properties")
NAMES += ("keys_russian", "pattern_9", "enum_objects", "tuple", "invoice")
DOZEN = [case for case in CASES if case.name in NAMES]


def open_world(
    model_dir: Path, *, lanes: int = 1, tp: int = 1, num_pages: int = 8192, max_running: int = 64
) -> LocalWorld:
    return LocalWorld(
        model_dir,
        first_layout(read_architecture(model_dir), lanes=lanes, tp=tp),
        limits=Limits(step_tokens=256, max_running=max_running, max_waiting=512, chunk_tokens=24),
        page_tokens=16,
        num_pages=num_pages,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model_dir)


def closing(tokenizer: Tokenizer, **fields: Any) -> Sampling:
    """What makes noise end: closing tokens likelier, and those less that only make things longer."""
    marks = [*b'"}]', tokenizer.special_id(CALL_END), tokenizer.special_id(SECTION_END)]
    bias = {**dict.fromkeys(marks, 6.0), **dict.fromkeys(b" \n\t\\[{,0123456789", -3.0)}
    return Sampling(**{"temperature": 1.0, "max_tokens": 1500, "logit_bias": bias, "seed": 7, **fields})


def forced(case: Case, sampling: Sampling) -> Sampling:
    tool = CallableTool(name="f", parameters=json.dumps(case.schema))
    return replace(sampling, constraint=ToolCalls(tools=(tool,), is_required=True, max_calls=2))


def check_calls(tokenizer: Tokenizer, output: Generated, case: Case) -> bool:
    """Whether the answer ended by itself; then its calls are valid, and else it says that it was cut."""
    if output.finish is FinishReason.LENGTH:
        return False
    assert output.finish is FinishReason.STOP, (case.name, output.error)
    parser = ToolCallParser(tokenizer)
    answer = collect(parser.push(output.token_ids) + parser.finish(is_cut=False))
    assert answer.content == ""
    assert 1 <= len(answer.tool_calls) <= 2
    for call in answer.tool_calls:
        assert call.name == "f"
        check_valid(str(call.arguments), case.schema)
    return True


def call_all(
    world: LocalWorld, tokenizer: Tokenizer, cases: Sequence[Case], **fields: Any
) -> list[Generated]:
    return world.generate(
        [PROMPT] * len(cases), [forced(case, closing(tokenizer, **fields)) for case in cases]
    )


@pytest.fixture(scope="module")
def world(tiny_model_dir: Path) -> Iterator[LocalWorld]:
    with open_world(tiny_model_dir) as world:
        yield world


@pytest.fixture(scope="module")
def dozen(world: LocalWorld, tiny_tokenizer: Tokenizer) -> list[Generated]:
    return call_all(world, tiny_tokenizer, DOZEN)


def test_forced_calls_of_noise_are_valid(dozen: list[Generated], tiny_tokenizer: Tokenizer) -> None:
    assert len(DOZEN) == 12
    ended = [check_calls(tiny_tokenizer, output, case) for output, case in zip(dozen, DOZEN, strict=True)]
    assert sum(ended) >= 11


def test_a_prompt_in_the_cache_changes_no_constrained_answer(
    world: LocalWorld, tiny_tokenizer: Tokenizer
) -> None:
    """Of `n` outputs that share their prompt's pages, too: each takes its own way through the grammar."""
    prompt = [*b"A prompt of more than one page, the same for all of them. Call it."]
    requests = [
        Request(
            request_id=RequestId(f"cached-{number}"),
            prompt=tuple(prompt),
            sampling=forced(DOZEN[0], closing(tiny_tokenizer, max_tokens=400)),
            num_outputs=3,
        )
        for number in range(2)
    ]
    feed = Feed(world.ports, lane_outputs=8)
    answers = []
    for request in requests:
        answers.append(feed.put(request, 0))
        while len(feed) > 0:
            feed.wait(0.05)
    first, again = ([output.token_ids for output in outputs] for outputs in answers)
    assert first == again
    assert len({tuple(ids) for ids in first}) == 3
    assert answers[1][0].usage.cached_tokens >= 48, "the cache was not used"
    for output in (*answers[0], *answers[1]):
        check_calls(tiny_tokenizer, output, DOZEN[0])


@pytest.mark.slow
def test_all_forced_calls_of_noise_are_valid_at_tp_2(tiny_model_dir: Path, tiny_tokenizer: Tokenizer) -> None:
    """At tp 1 they are in `test_forced_calls`."""
    with open_world(tiny_model_dir, tp=2) as world:
        outputs = call_all(world, tiny_tokenizer, CASES, max_tokens=500)
    ended = [check_calls(tiny_tokenizer, output, case) for output, case in zip(outputs, CASES, strict=True)]
    assert sum(ended) >= 140


def test_a_cut_call_says_so(world: LocalWorld, tiny_tokenizer: Tokenizer) -> None:
    outputs = call_all(world, tiny_tokenizer, DOZEN, max_tokens=20)
    assert {(output.finish, len(output.token_ids)) for output in outputs} == {(FinishReason.LENGTH, 20)}


@pytest.mark.parametrize(
    ("tp", "lanes", "limits"),
    [
        (2, 1, {}),
        (1, 2, {"max_running": 2}),
        (1, 1, {"num_pages": 16}),  # they lose their pages, and their grammars are made again from the tokens
    ],
    ids=["two tp ranks", "two lanes", "preempted"],
)
def test_they_depend_on_nothing_but_the_request(
    tp: int,
    lanes: int,
    limits: dict[str, int],
    dozen: list[Generated],
    tiny_model_dir: Path,
    tiny_tokenizer: Tokenizer,
) -> None:
    short = [i for i, output in enumerate(dozen) if 40 < len(output.token_ids) < 100]
    assert sum(len(dozen[i].token_ids) for i in short) > 16 * 16, "they fit, and nobody is preempted"
    cases = [DOZEN[i] for i in short]
    with open_world(tiny_model_dir, lanes=lanes, tp=tp, **limits) as world:
        outputs = call_all(world, tiny_tokenizer, cases, max_tokens=120)
    assert [output.token_ids for output in outputs] == [dozen[i].token_ids for i in short]


def test_constraints_go_with_the_rest_of_sampling(world: LocalWorld, tiny_tokenizer: Tokenizer) -> None:
    """In one batch: filters, penalties, a bias against all that is allowed, stop strings, logprobs, none."""
    free = Sampling(temperature=1.0, max_tokens=12, seed=1, ignore_eos=True)
    digits = Regex(pattern="[0-9]{40}")
    yes_no = Choice(choices=("yes", "no"))
    samplings = [
        free,
        Sampling(temperature=0.0, constraint=digits, repetition_penalty=5.0, frequency_penalty=2.0),
        Sampling(temperature=2.0, constraint=digits, top_k=3, top_p=0.5, min_p=0.4, seed=3, logprobs=2),
        Sampling(constraint=yes_no, logit_bias=dict.fromkeys(b"yn", -100.0), temperature=0.0),
        Sampling(constraint=yes_no, logit_bias={ord("y"): 100.0, ord("x"): 100.0}, logprobs=1),
        Sampling(constraint=Choice(choices=("one two three",)), stop=("two",)),
        Sampling(constraint=Choice(choices=("one two three",)), stop_token_ids=(ord("t"),)),
        Sampling(constraint=Choice(choices=("",))),
        Sampling(constraint=yes_no, ignore_eos=True, max_tokens=30),
    ]
    outputs = world.generate([PROMPT] * len(samplings), samplings)
    (alone,) = world.generate([PROMPT], [free])
    texts = [tiny_tokenizer.decode(output.token_ids, skip_special=True) for output in outputs]
    assert outputs[0].token_ids == alone.token_ids
    for output, text in zip(outputs[1:3], texts[1:3], strict=True):
        assert text.isdecimal()
        assert len(text) == 40
        assert output.finish is FinishReason.STOP
    assert len(set(texts[1][:10])) == 10, "penalties act on what the mask leaves"
    assert texts[3] in ("yes", "no")
    assert texts[4] == "yes"
    first = outputs[4].logprobs[0]
    assert first.top[0][0] != ord("y"), "logprobs are of the raw logits"
    assert (texts[5], outputs[5].stop_match) == ("one two", "two")
    assert (texts[6], outputs[6].stop_match) == ("one t", ord("t"))
    assert texts[7] == ""
    assert texts[8].startswith(("yes", "no"))
    assert (len(outputs[8].token_ids), outputs[8].finish) == (30, FinishReason.LENGTH)
    assert all(len(output.logprobs) == len(output.token_ids) for output in (outputs[2], outputs[4]))


def test_a_lane_refuses_what_it_cannot_enforce(world: LocalWorld) -> None:
    with pytest.raises(RequestError, match="uniqueItems"):
        world.generate([PROMPT], Sampling(constraint=JsonSchema(schema='{"uniqueItems": true}')))
    (output,) = world.generate([PROMPT], Sampling(constraint=Choice(choices=("fine",))))
    assert bytes(output.token_ids[:4]) == b"fine"


def test_an_answer_whose_grammar_is_stuck_ends_alone(world: LocalWorld) -> None:
    """Tokens that its constraint never allowed, as of a recovery by another version: an error, no crash."""
    sampling = Sampling(constraint=Choice(choices=("fine",)), max_tokens=20)
    strange = Request(
        request_id=RequestId("strange"), prompt=tuple(PROMPT), sampling=sampling, generated={0: (120, 121)}
    )
    good = Request(request_id=RequestId("good"), prompt=tuple(PROMPT), sampling=sampling)
    feed = Feed(world.ports, lane_outputs=4)
    outputs = [*feed.put(strange, 0), *feed.put(good, 0)]
    while len(feed) > 0:
        feed.wait(0.05)
    assert [output.finish for output in outputs] == [FinishReason.ERROR, FinishReason.STOP]
    assert outputs[0].error.startswith("constraint: ")


def test_masks_are_counted(world: LocalWorld, tiny_tokenizer: Tokenizer) -> None:
    before = world.ranks[0].stats()
    (output,) = call_all(world, tiny_tokenizer, DOZEN[:1], max_tokens=20)
    after = world.ranks[0].stats()
    assert len(output.token_ids) <= after.num_masks - before.num_masks <= len(output.token_ids) + 1
    assert after.num_masks_late <= after.num_steps
