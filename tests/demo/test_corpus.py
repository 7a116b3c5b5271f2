"""The conversations: equal seeds give equal ones, and nothing held out is ever trained on."""

import re
from itertools import islice
from random import Random

import pytest

from k2dist.demo import MODEL_DIR, corpus, names, phrases, tools
from k2dist.demo.batches import CONTEXT_WEIGHT, batches, drills, encode
from k2dist.demo.evaluate import held_out_cases
from k2dist.text.chat import encode_chat, render_text
from k2dist.text.tokenizer import IM_END, Tokenizer

NUM = 400
PHRASINGS = {
    name: getattr(phrases, name)
    for name in (
        *("WEATHER", "WEATHER_AGAIN", "TIME", "SUM", "CAPITAL", "CAPITAL_AGAIN", "REPEAT", "WHO"),
        *("SKILLS", "GREETING", "THANKS", "UNKNOWN"),
    )
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL_DIR)


def test_equal_seeds_give_equal_conversations() -> None:
    first, again = (list(islice(corpus.conversations(7), NUM)) for _ in range(2))
    assert first == again
    assert list(islice(corpus.conversations(8), NUM)) != first


def test_each_list_of_phrasings_has_both_sides() -> None:
    for name, sentences in PHRASINGS.items():
        sides = {names.is_held_out(sentence) for sentence in sentences}
        assert sides == {True, False}, name


def test_about_a_fifth_is_held_out() -> None:
    for texts in (names.CITIES, phrases.WEATHER, tuple(map(str, range(5000)))):
        share = sum(map(names.is_held_out, texts)) / len(texts)
        assert 0.15 < share < 0.26


def test_training_calls_hold_no_held_out_city_and_no_held_out_pair() -> None:
    num_calls = 0
    for conversation in islice(corpus.conversations(3), 4 * NUM):
        for message in conversation.messages:
            for call in message.tool_calls:
                assert isinstance(call.arguments, dict)
                held = names.is_held_out(
                    str(call.arguments["city"])
                    if "city" in call.arguments
                    else "{a} + {b}".format_map(call.arguments)
                )
                assert not held, call
                num_calls += 1
    assert num_calls > NUM


def test_no_training_tool_says_a_held_out_word_for_the_weather() -> None:
    held = {text for text in tools.CONDITIONS if names.is_held_out(text)}
    assert len(held) >= 20
    assert len(tools.CONDITIONS) - len(held) >= 60
    longest_first = sorted(
        tools.CONDITIONS, key=len, reverse=True
    )  # "few clouds" is another one than "clouds"
    pattern = re.compile(rf"\b({'|'.join(longest_first)})\b")
    num_results = 0
    for conversation in islice(corpus.conversations(3), 4 * NUM):
        for message in conversation.messages:
            if message.role == "tool":
                assert not held & set(pattern.findall((message.content or "").lower())), message.content
                num_results += 1
    assert num_results > NUM


def test_the_answer_says_the_tools_word_as_it_stands() -> None:
    """With every form that a tool's answer without a temperature takes, the publisher's own among them."""
    rng, forms = Random(5), set()
    for _ in range(NUM):
        body, sky, words = tools.word_result(rng, "Oslo", held_out=False)
        assert words == f"It is {sky} in Oslo."
        assert body.count(sky) == 1
        forms.add(body.replace(sky, "SKY"))
    assert {'{"weather": "SKY"}', '{"weather":"SKY"}', "{'weather': 'SKY'}", "SKY", '"SKY"'} <= forms
    assert {'{"city": "Oslo", "weather": "SKY"}', '{"sky": "SKY"}'} <= forms


def test_held_out_cases_are_of_the_other_side() -> None:
    cases = held_out_cases()
    weather = [case for case in cases if case.kind == "weather"]
    assert len(weather) == 200
    weather += [case for case in cases if case.kind == "weather, word only"]
    assert len(weather) == 250
    for case in weather:
        assert case.call is not None
        city = case.call[1]["city"]
        assert city in names.CITIES
        assert names.is_held_out(city)
        assert names.is_held_out(case.wanted)
        question = case.messages[-1].content
        assert question is not None
        assert names.is_held_out(question.replace(city, "{city}"))
        assert case.wanted in case.result
        assert "get_weather" in {tool["function"]["name"] for tool in case.tools}


def test_no_training_question_is_a_held_out_question() -> None:
    asked = {case.messages[-1].content for case in held_out_cases() if case.kind in ("weather", "time")}
    for conversation in islice(corpus.conversations(1), 4 * NUM):
        assert not asked & {m.content for m in conversation.messages if m.role == "user"}


def test_calls_are_numbered_over_the_conversation_and_answered() -> None:
    for conversation in islice(corpus.conversations(5), NUM):
        ids = [call.id for message in conversation.messages for call in message.tool_calls]
        assert [call_id.rsplit(":", 1)[1] for call_id in ids] == [str(n) for n in range(len(ids))]
        answered = [m.tool_call_id for m in conversation.messages if m.role == "tool"]
        assert answered == ids
        assert conversation.messages[-1].role == "assistant"


def test_only_declared_tools_are_called() -> None:
    for conversation in islice(corpus.conversations(6), NUM):
        declared = {tool["function"]["name"] for tool in conversation.tools}
        called = {call.name for message in conversation.messages for call in message.tool_calls}
        assert called <= declared


def test_every_conversation_survives_its_tokens(tokenizer: Tokenizer) -> None:
    for conversation in islice(corpus.conversations(2), NUM):
        ids = encode_chat(tokenizer, conversation.messages, conversation.tools, add_generation_prompt=False)
        text = render_text(conversation.messages, conversation.tools, add_generation_prompt=False)
        assert tokenizer.decode(ids) == text


def test_full_weight_is_on_the_assistants_words_alone(tokenizer: Tokenizer) -> None:
    for conversation in islice(corpus.conversations(4), 50):
        ids, weights = encode(tokenizer, conversation)
        assert set(weights) <= {1.0, CONTEXT_WEIGHT}
        written = [i for i, weight in zip(ids, weights, strict=True) if weight == 1.0]
        turns = [m for m in conversation.messages if m.role == "assistant"]
        assert written.count(tokenizer.special_id(IM_END)) == len(turns)
        plain = [m.content for m in turns if m.content]
        decoded = tokenizer.decode(written)
        assert all(text in decoded for text in plain)


def test_batches_keep_to_their_bounds(tokenizer: Tokenizer) -> None:
    source = batches(
        tokenizer, corpus.conversations(1), batch_tokens=1024, max_tokens=200, drill_share=0.2, seed=1
    )
    for batch in islice(source, 30):
        assert batch.token_BS.shape == batch.weight_BS.shape
        assert batch.token_BS.numel() <= 1024
        assert batch.token_BS.shape[1] <= 200
        assert (batch.weight_BS.amax(1) == 1.0).all()


def test_a_drill_is_graded_where_copying_predicts_it() -> None:
    for ids, weights in islice(drills(Random(1), 60, vocab_size=500), 20):
        period = weights.index(1.0) - 1
        for index, weight in enumerate(weights):
            if weight == 1.0:
                assert ids[index] == ids[index - period]
