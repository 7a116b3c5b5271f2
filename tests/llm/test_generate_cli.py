"""`k2dist generate`: lines in, lines out, in order; exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from k2dist.cli.app import app, run
from k2dist.errors import CheckpointError, UsageError

WEATHER = {"type": "function", "function": {"name": "get_weather"}}


def invoke(model_dir: Path, *arguments: str | Path, stdin: str | None = None) -> Result:
    options = ["--model", str(model_dir), "--max-tokens", "4", "--temperature", "0"]
    return CliRunner().invoke(app, ["generate", *map(str, arguments), *options], input=stdin)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_arguments_are_prompts(tiny_model_dir: Path) -> None:
    result = invoke(tiny_model_dir, "abc", "x", "abc")
    assert (result.exit_code, result.stderr) == (0, "")
    first, other, again = lines(result.stdout)
    assert [first["index"], other["index"], again["index"]] == [0, 1, 2]
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    assert first["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 4}
    assert first["finish_reason"] == "length"
    assert "error" not in first


def test_each_line_of_a_file_is_a_prompt(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_bytes(b"abc\n\n\xff\nabc")
    result = invoke(tiny_model_dir, "--file", prompts, "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "k2dist: line 2: prompt: empty; give at least one token",
        "k2dist: line 3: prompt: not UTF-8: invalid start byte at byte 0",
        "k2dist: 2 of 4 prompts have an error",
    ]
    first, empty, broken, last = lines(out.read_text())
    assert first["token_ids"] == last["token_ids"]
    assert empty["error"] == {"field": "prompt", "message": "empty; give at least one token"}
    assert broken["error"]["message"].startswith("not UTF-8")


def test_texts_may_be_messages(tiny_model_dir: Path) -> None:
    as_chat = invoke(tiny_model_dir, "--chat", "--system", "Be brief.", "Hello")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    as_json = invoke(tiny_model_dir, "--jsonl", "-", stdin=json.dumps({"messages": messages}))
    assert as_chat.exit_code == as_json.exit_code == 0
    assert lines(as_chat.stdout)[0]["token_ids"] == lines(as_json.stdout)[0]["token_ids"]


def test_json_lines_say_what_they_want(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    asks: list[Any] = [
        {"prompt": "abc", "id": "first"},
        {"prompt": [97, 98, 99], "sampling": {"n": 2, "logprobs": 1, "seed": 3, "temperature": None}},
        {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER], "sampling": {"max_tokens": 2}},
        {"prompt": "abc", "sampling": {"prompt_logprobs": 0, "logit_bias": {"120": 100}}},
    ]
    path.write_text("\n".join(map(json.dumps, asks)))
    result = invoke(tiny_model_dir, "--jsonl", path)
    assert result.exit_code == 0
    first, two, chat, scored = lines(result.stdout)
    assert first["id"] == "first"
    assert [len(one["token_ids"]) for one in two["outputs"]] == [4, 4]
    assert two["outputs"][0] != two["outputs"][1], "null is the model's own temperature"
    assert [len(one["top"]) for one in two["outputs"][0]["logprobs"]] == [1] * 4
    assert two["seed"] == 3
    assert len(chat["token_ids"]) == 2
    assert scored["token_ids"] == [120] * 4
    assert [one["token_id"] for one in scored["prompt_logprobs"]] == [98, 99]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("nonsense", "line"),
        ("", "line"),
        ("[]", ""),
        ('{"prompt": 7}', "prompt"),
        ('{"prompt": [512]}', "prompt"),
        ('{"prompt": "a", "messages": []}', "prompt"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "user", "contents": "a"}]}', "messages[0].contents"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "messages[0].tool_call_id"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}', "tools[0]"),
        ('{"prompt": "a", "tools": [{}]}', "tools"),
        ('{"id": "x"}', "prompt"),
        ('{"prompt": "a", "temperature": 1}', "temperature"),
        ('{"prompt": "a", "sampling": {"temperature": -1}}', "sampling.temperature"),
        ('{"prompt": "a", "sampling": {"temperature": "b"}}', "sampling.temperature"),
        ('{"prompt": "a", "sampling": {"heat": 1}}', "sampling.heat"),
    ],
)
def test_a_wrong_line_fails_alone(tiny_model_dir: Path, line: str, field: str) -> None:
    good = '{"prompt": "abc"}'
    result = invoke(tiny_model_dir, "--jsonl", "-", stdin=f"{good}\n{line}\n{good}\n{line}\n")
    assert result.exit_code == 1
    first, wrong, second, last = lines(result.stdout)
    assert first["token_ids"] == second["token_ids"]
    assert (wrong["index"], last["index"]) == (1, 3)
    assert wrong["finish_reason"] == "error"
    assert wrong["error"]["field"] == last["error"]["field"] == field


def test_only_a_few_errors_are_listed(tiny_model_dir: Path) -> None:
    result = invoke(tiny_model_dir, *[""] * 7, "abc")
    assert result.stderr.splitlines() == [
        *(f"k2dist: prompt {number}: prompt: empty; give at least one token" for number in range(1, 6)),
        "k2dist: 7 of 8 prompts have an error; of the others see their lines",
    ]


def test_any_field_of_sampling_is_an_option(tiny_model_dir: Path) -> None:
    """What has no option of its own; it also wins over those, as a line's own sampling wins over both."""
    said = json.dumps({"logit_bias": {"120": 100}, "max_tokens": 2, "prompt_logprobs": 1})
    options = ["--sampling", said, "--jsonl", "-"]
    asks = [{"prompt": "abc"}, {"prompt": "abc", "sampling": {"max_tokens": 3, "logit_bias": {}}}]
    result = invoke(tiny_model_dir, *options, stdin="\n".join(map(json.dumps, asks)))
    assert result.exit_code == 0
    biased, plain = lines(result.stdout)
    assert biased["token_ids"] == [120, 120]
    assert len(plain["token_ids"]) == 3
    assert plain["token_ids"] != [120] * 3
    assert len(plain["prompt_logprobs"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["abc", "--file", "prompts.txt"],
        ["--file", "no such file"],
        ["--jsonl", "no such file"],
        ["--jsonl", "-", "--chat"],
        ["abc", "--system", "Be brief."],
        ["abc", "--out", "no such directory/answers"],
        ["abc", "--top-p", "2"],
        ["abc", "--n", "0"],
        ["abc", "--sampling", "{"],
        ["abc", "--sampling", '{"heat": 1}'],
        ["abc", "--sampling", '{"min_p": 2}'],
        ["abc", "--lanes", "0"],
        ["abc", "--tp", "3"],
    ],
)
def test_a_wrong_command_line_is_bad_usage(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(tiny_model_dir, *arguments)
    assert isinstance(result.exception, UsageError)
    assert result.stdout == ""


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["k2dist", "generate"])
    with pytest.raises(SystemExit) as usage:
        run()
    monkeypatch.setattr(sys, "argv", ["k2dist", "generate", "--model", str(tmp_path / "none"), "abc"])
    with pytest.raises(SystemExit) as failure:
        run()
    assert (usage.value.code, failure.value.code) == (2, 1)
    assert isinstance(invoke(tmp_path / "none", "abc").exception, CheckpointError)
