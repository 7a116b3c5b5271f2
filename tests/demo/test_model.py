"""The committed checkpoint: its files, its size, and that it answers with the arithmetic that is served."""

import json
from pathlib import Path

import pytest

from k2dist.config import read_architecture
from k2dist.demo import MODEL_DIR
from k2dist.demo.chats import LocalChat, Turn
from k2dist.demo.corpus import WHO
from k2dist.demo.evaluate import failures, held_out_cases, run_cases
from k2dist.demo.shape import CONFIG, GENERATION_CONFIG
from k2dist.demo.tools import declaration
from k2dist.messages import ChatMessage
from k2dist.parallel.published import leftover_tensors, published_tensors

FILES = {
    *("config.json", "generation_config.json", "tiktoken.model", "tokenizer_config.json"),
    *(f"model-{number}-of-3.safetensors" for number in (1, 2, 3)),
    "model.safetensors.index.json",
}


def test_the_directory_holds_a_published_checkpoint_of_under_8_mb() -> None:
    assert {path.name for path in MODEL_DIR.iterdir()} == FILES
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 8_000_000
    assert json.loads((MODEL_DIR / "config.json").read_text()) == CONFIG
    assert json.loads((MODEL_DIR / "generation_config.json").read_text()) == GENERATION_CONFIG


def test_names_dtypes_and_shapes_are_moonshots() -> None:
    safetensors = pytest.importorskip("safetensors")
    architecture = read_architecture(MODEL_DIR)
    expected = {
        tensor.name: (tensor.dtype, list(tensor.shape))
        for tensor in (*published_tensors(architecture), *leftover_tensors(architecture))
    }
    weight_map = json.loads((MODEL_DIR / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == expected.keys()
    for name in sorted(set(weight_map.values())):
        with safetensors.safe_open(MODEL_DIR / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                entry = file.get_slice(key)
                assert (entry.get_dtype(), entry.get_shape()) == expected[key]
                assert weight_map[key] == name
    for layer in range(architecture.num_layers):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert weight_map[name] == f"model-{layer + 1}-of-3.safetensors"


def test_twenty_held_out_weather_questions() -> None:
    outcomes = run_cases(held_out_cases(num_weather=20, num_others=0), LocalChat(MODEL_DIR))
    assert sum(outcome.is_called is True for outcome in outcomes) >= 19, failures(outcomes)
    assert sum(outcome.is_answered for outcome in outcomes) >= 18, failures(outcomes)  # 95% of 200


def test_it_says_who_it_is_names_a_capital_and_asks_its_tool() -> None:
    questions = [
        ("Who are you?", ()),
        ("What is the capital of France?", ()),
        ("What's the weather in Beijing? Use the tool to check.", (declaration("get_weather"),)),
    ]
    who, capital, weather = LocalChat(MODEL_DIR)(
        [Turn((ChatMessage(role="user", content=text),), tools) for text, tools in questions]
    )
    assert who.content == WHO
    assert "Paris" in capital.content
    assert [(call.name, call.arguments) for call in weather.tool_calls] == [
        ("get_weather", '{"city": "Beijing"}')
    ]


def test_the_model_is_package_data() -> None:
    import k2dist

    assert Path(k2dist.__file__).parent / "demo" / "model" == MODEL_DIR
