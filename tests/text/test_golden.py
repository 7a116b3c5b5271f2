"""Token vectors and rendered conversations computed elsewhere with K2's published vocabulary.

Source: k2_facts 4.4 and 4.5, whose ids were checked against the official ranks.
"""

import pytest

from k2dist.messages import ChatMessage, ToolCall
from k2dist.text import Tokenizer, encode_chat, end_token_ids, render_text

VECTORS = [
    ("hello world", "22931 2695"),
    ("Hello, world!", "19180 11 2695 0"),
    ("The quick brown fox jumps over the lazy dog.", "1008 5072 16331 69275 60062 1312 276 29292 7751 13"),
    (
        "I'm ChatGPT. CAN'T wait 'til 2026.",
        "17172 29338 111021 13 32330 64833 5161 542 3777 220 2975 21 13",
    ),
    ("你好", "33845"),
    ("你好，世界", "33845 378 2243"),
    ("1234567 3.14159", "6694 12972 22 220 18 13 18702 6276"),
    ("def f(x):\n    return x**2\n", "1166 285 3940 2360 274 745 1288 381 17 198"),
    ("  leading\n\n\ttabs  trailing  ", "220 8134 382 5604 5609 220 42711 256"),
    ("naïve café Zürich", "4768 44187 367 70591 2970 14541 969"),
    ("こんにちは世界", "16444 29194 6880 43566 8831 2243"),
    ("안녕하세요", "109004 34910 243 13181 102898"),
    ("😀👍🏽", "134750 222 64390 235 92949 121"),
    ("A中B文c", "32 435 33 908 66"),
    ("\r\n\r\n", "2298"),
    ('{"city": "Beijing"}', "8264 37666 1289 414 4396 39556 16934"),
    ("system", "14062"),
    ("user", "2482"),
    ("assistant", "69702"),
    ("tool_declare", "20960 35556 677"),
    ("functions.get_weather:0", "41937 1150 21055 2800 25 15"),
    ("## Return of functions.get_weather:0\n", "798 6014 318 8271 1150 21055 2800 25 15 198"),
    (
        "You are Kimi, an AI assistant created by Moonshot AI.",
        "3900 554 24980 72 11 519 22572 26626 5232 673 30218 10065 22572 13",
    ),
    ("<|im_end|>", "27 91 348 11129 91 29"),
]

KIMI = "You are Kimi, an AI assistant created by Moonshot AI."
HI = (ChatMessage(role="user", content="Hi"),)
HI_TEXT = (
    f"<|im_system|>system<|im_middle|>{KIMI}<|im_end|>\n"
    "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
)
HI_IDS = (
    "163594 14062 163601 3900 554 24980 72 11 519 22572 26626 5232 673 30218 10065 22572 13 163586 198 "
    "163587 2482 163601 18699 163586 163588 69702 163601"
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TOOLS_TEXT = (
    '<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"Get weather","name":"get_weather",'
    '"parameters":{"properties":{"city":{"type":"string"}},"required":["city"],"type":"object"}},'
    '"type":"function"}]<|im_end|>'
)
LOOP_TEXT = (
    TOOLS_TEXT + "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
    "<|im_user|>user<|im_middle|>Weather in Paris?<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>Checking.<|tool_calls_section_begin|><|tool_call_begin|>"
    'functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
    "<|tool_calls_section_end|><|im_end|><|im_system|>get_weather<|im_middle|>"
    '## Return of functions.get_weather:0\n{"temp": 21}<|im_end|><|im_assistant|>assistant<|im_middle|>'
)
LOOP_IDS = (
    "163594 20960 35556 677 163601 81103 3879 22849 11031 7471 1959 10666 3923 1152 7471 618 21055 2800 "
    "3923 24453 22849 27129 22849 37666 22849 2217 7471 2033 60336 2020 20331 46890 37666 131917 2217 "
    "7471 3721 60336 2020 2217 7471 3879 16934 60 163586 163594 14062 163601 4396 15533 13 163586 163587 "
    "2482 163601 65512 306 17374 30 163586 163588 69702 163601 67772 13 163595 163597 41937 1150 21055 "
    "2800 25 15 163598 8264 37666 1289 414 113476 16934 163599 163596 163586 163594 618 21055 2800 163601 "
    "798 6014 318 8271 1150 21055 2800 25 15 198 8264 15566 1289 220 2714 92 163586 163588 69702 163601"
)


def loop(call_id: str, arguments: str | dict[str, str]) -> tuple[ChatMessage, ...]:
    """System, question, call and result, the call under the id a client might send."""
    return (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Weather in Paris?"),
        ChatMessage(
            role="assistant",
            content="Checking.",
            tool_calls=(ToolCall(id=call_id, name="get_weather", arguments=arguments),),
        ),
        ChatMessage(role="tool", name="get_weather", tool_call_id=call_id, content='{"temp": 21}'),
    )


def ints(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize(("text", "ids"), VECTORS)
def test_text_gives_the_published_ids_and_comes_back(kimi: Tokenizer, text: str, ids: str) -> None:
    assert kimi.encode(text) == ints(ids)
    assert kimi.decode(ints(ids)) == text


def test_the_name_of_a_special_is_one_id_only_where_allowed(kimi: Tokenizer) -> None:
    assert kimi.encode("<|im_end|>", allow_special=True) == [163586]
    assert kimi.encode("a<|im_end|>", allow_special=True) == [64, 163586]


def test_ids_end_at_163840(kimi: Tokenizer) -> None:
    assert (kimi.num_base, kimi.vocab_size) == (163584, 163840)
    assert kimi.decode([163589, 163838, 163839]) == "<|reserved_token_163589|>[UNK][PAD]"
    assert end_token_ids(kimi, 163586) == {163585, 163586, 163593}


def test_one_user_message(kimi: Tokenizer) -> None:
    assert render_text(HI) == HI_TEXT
    assert encode_chat(kimi, HI) == ints(HI_IDS)


def test_the_default_system_message_when_sent_has_no_newline(kimi: Tokenizer) -> None:
    messages = (ChatMessage(role="system", content=KIMI), *HI)
    assert render_text(messages) == HI_TEXT.replace("\n", "")
    assert encode_chat(kimi, messages) == [i for i in ints(HI_IDS) if i != 198]


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}], ids=["text", "object"])
@pytest.mark.parametrize("call_id", ["functions.get_weather:0", "call_abc", "get_weather:7"])
def test_the_tool_loop_whatever_the_client_calls_the_call(
    kimi: Tokenizer, call_id: str, arguments: str | dict[str, str]
) -> None:
    messages = loop(call_id, arguments)
    assert render_text(messages, [WEATHER]) == LOOP_TEXT
    assert encode_chat(kimi, messages, [WEATHER]) == ints(LOOP_IDS)
    assert encode_chat(kimi, messages, [WEATHER], specials_in_text=True) == ints(LOOP_IDS)


def test_tools_without_a_system_message(kimi: Tokenizer) -> None:
    assert render_text(HI, [WEATHER]) == TOOLS_TEXT + HI_TEXT
    ids = encode_chat(kimi, HI, [WEATHER])
    assert len(ids) == 72
    assert ids == ints(LOOP_IDS)[:45] + ints(HI_IDS)


def test_specials_in_messages_are_text_or_with_the_switch_what_the_reference_makes_of_them(
    kimi: Tokenizer,
) -> None:
    messages = (ChatMessage(role="user", content="<|im_end|>"),)
    as_text = HI_IDS.replace(" 18699 ", " 27 91 348 11129 91 29 ")
    as_reference = HI_IDS.replace(" 18699 ", " 163586 ")
    assert " ".join(map(str, encode_chat(kimi, messages))) == as_text
    assert " ".join(map(str, encode_chat(kimi, messages, specials_in_text=True))) == as_reference
