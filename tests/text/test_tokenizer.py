"""The tokenizer on a small vocabulary: round trips, specials, long text, and what it refuses."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.errors import CheckpointError, RequestError
from k2dist.text.tokenizer import IM_END, K2_SPECIALS, Fragment, Tokenizer, end_token_ids

# A test's examples depend on the test alone; a deadline would measure the machine.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)

BYTES = [bytes((byte,)) for byte in range(256)]
SPECIALS = {256 + offset: name for offset, name in K2_SPECIALS.items()}

anything = st.text() | st.lists(st.sampled_from([*K2_SPECIALS.values(), "<|", "hello", " 你", "\n"])).map(
    "".join
)


@PROPERTY
@given(text=anything)
def test_text_comes_back_and_never_holds_a_special(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.decode_bytes(ids) == text.encode()
    assert not any(map(small.is_special, ids))


@PROPERTY
@given(text=anything)
def test_allowed_specials_are_exactly_the_names_in_the_text(small: Tokenizer, text: str) -> None:
    ids = small.encode(text, allow_special=True)
    names = re.findall("|".join(map(re.escape, K2_SPECIALS.values())), text)
    assert [small.decode([i]) for i in ids if small.is_special(i)] == names
    assert small.decode(ids) == text
    assert small.decode(ids, skip_special=True) == re.sub("|".join(map(re.escape, names)) or "$^", "", text)


@PROPERTY
@given(fragments=st.lists(st.builds(Fragment, st.text(), st.just(False)) | st.just(Fragment(IM_END, True))))
def test_fragments_encode_as_their_whole_text_does(small: Tokenizer, fragments: list[Fragment]) -> None:
    whole = "".join(fragment.text for fragment in fragments)
    assert small.encode_fragments(fragments) == small.encode(whole, allow_special=True)


def test_specials_follow_the_vocabulary_whatever_its_size(small: Tokenizer) -> None:
    assert small.vocab_size == small.num_base + 256
    for offset, name in K2_SPECIALS.items():
        assert small.special_id(name) == small.num_base + offset
        assert small.token_bytes(small.num_base + offset) == name.encode()
        assert small.text_bytes(small.num_base + offset) == b""
    unnamed = small.num_base + 5
    assert small.decode([unnamed]) == f"<|reserved_token_{unnamed}|>"
    assert small.encode(f"<|reserved_token_{unnamed}|>", allow_special=True) == [unnamed]
    with pytest.raises(CheckpointError, match="<think>"):
        small.special_id("<think>")


@pytest.mark.parametrize("offset", [-1, 0, 1000])
def test_ids_outside_the_vocabulary_are_the_clients_fault(small: Tokenizer, offset: int) -> None:
    token_id = -1 if offset < 0 else small.vocab_size + offset
    with pytest.raises(RequestError, match=f"token_ids: {token_id} is outside"):
        small.decode([token_id], skip_special=True)


def test_a_half_character_is_a_replacement_character(small: Tokenizer) -> None:
    half = small.encode("你")
    assert half == [small.num_base - 1]
    assert small.decode([small.num_base - 2]) == "\ufffd"
    assert small.decode_bytes([small.num_base - 2]) == "你".encode()[:2]


@pytest.mark.parametrize("text", ["A你", "A你a", "a A你B"])
def test_han_characters_are_pieces_of_their_own(small: Tokenizer, text: str) -> None:
    """Though the vocabulary holds "A你" in one token."""
    assert small.token_bytes(small.num_base - 3) == "A你".encode()
    assert small.num_base - 3 not in small.encode(text)
    assert small.num_base - 1 in small.encode(text)


def test_end_tokens_are_the_configured_and_the_named_ones(small: Tokenizer) -> None:
    named = {small.special_id(name) for name in ("[EOS]", "<|im_end|>", "[EOT]")}
    assert end_token_ids(small, None) == named
    assert end_token_ids(small, 7) == named | {7}
    assert end_token_ids(small, [7, small.special_id(IM_END)]) == named | {7}


def pieces_by_hand(text: str) -> list[str]:
    """The cutting rule of tokenization_kimi.py, one character at a time."""
    pieces: list[str] = []
    for start in range(0, len(text), 400_000):
        piece, run, was_space = "", 0, None
        for character in text[start : start + 400_000]:
            run = run + 1 if character.isspace() is was_space else 1
            was_space = character.isspace()
            if run > 25_000:
                pieces.append(piece)
                piece, run = "", 1
            piece += character
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "hello" * 5_000,  # exactly one run of 25,000
        "hello" * 5_001,
        "x" + "hello" * 20_000 + " " * 60_001 + "hello",
        "hello world " * 33_334,  # a cut in a word at 400,000, no long run
        ("h" * 24_000 + "\n") * 17,
    ],
    ids=["fits", "one-over", "runs", "chunks", "chunk-restarts-run"],
)
def test_long_text_is_cut_as_the_reference_cuts_it(small: Tokenizer, text: str) -> None:
    pieces = pieces_by_hand(text)
    assert "".join(pieces) == text
    expected = [token_id for piece in pieces for token_id in small.encode(piece)]
    assert small.encode(text) == expected
    assert small.encode_fragments([Fragment(text, False)]) == expected


def test_cuts_are_counted_from_the_start_of_the_prompt(small: Tokenizer) -> None:
    fragments = [
        Fragment(IM_END, True),
        Fragment("hello" * 5_000, False),
        Fragment("hello" * 5_000, False),
        Fragment(IM_END, True),
        Fragment(" world" * 60_000, False),
    ]
    whole = "".join(fragment.text for fragment in fragments)
    ids = small.encode_fragments(fragments)
    assert ids == small.encode(whole, allow_special=True)
    assert small.decode(ids) == whole


def base64_lines(tokens: list[bytes]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]


def write_model(model_dir: Path, lines: list[str], config: Any) -> Path:
    (model_dir / "tiktoken.model").write_text("\n".join(lines) + "\n")
    text = config if isinstance(config, str) else json.dumps(config)
    (model_dir / "tokenizer_config.json").write_text(text)
    return model_dir


def good_config() -> dict[str, Any]:
    return {"added_tokens_decoder": {str(i): {"content": name} for i, name in SPECIALS.items()}}


def test_files_give_the_same_tokenizer_as_their_contents(tmp_path: Path) -> None:
    loaded = Tokenizer.load(
        write_model(
            tmp_path,
            base64_lines([*BYTES, b"he"]),
            {"added_tokens_decoder": {str(i + 1): {"content": name} for i, name in SPECIALS.items()}},
        )
    )
    made = Tokenizer([*BYTES, b"he"], {i + 1: name for i, name in SPECIALS.items()})
    text = "he<|im_end|>y"
    assert loaded.encode(text, allow_special=True) == made.encode(text, allow_special=True)
    assert loaded.encode("he") == [256]


BAD_LINES: list[tuple[str, Callable[[list[str]], list[str]], str]] = [
    ("gap", lambda lines: lines[:10] + lines[11:], r"tiktoken\.model: line 11: rank 11, need 10"),
    ("base64", lambda lines: ["!!! 0", *lines[1:]], r"tiktoken\.model: line 1: .*need `base64 rank`"),
    ("rank", lambda lines: [lines[0], "AQ== one"], r"tiktoken\.model: line 2: .*need `base64 rank`"),
    ("fields", lambda lines: [lines[0], "AQ=="], r"tiktoken\.model: line 2: has 1 fields"),
    ("blank", lambda lines: [lines[0], "", *lines[1:]], r"tiktoken\.model: line 2: has 0 fields"),
    ("few", lambda lines: lines[:255], r"tiktoken\.model: 255 tokens, need at least"),
    ("twice", lambda lines: [*lines[:255], "AQ== 255"], r"tokens 1 and 255 are the same bytes"),
    ("no-byte", lambda lines: [*lines[:255], "aGU= 255"], r"no token for the single byte 0xff"),
]


@pytest.mark.parametrize(
    ("spoil", "message"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES]
)
def test_a_bad_vocabulary_is_refused_with_its_line(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]], message: str
) -> None:
    write_model(tmp_path, spoil(base64_lines(BYTES)), good_config())
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{\n"added_tokens_decoder": {,}}', r"tokenizer_config\.json: not JSON: .*line 2"),
        ([], r'tokenizer_config\.json: needs an object "added_tokens_decoder"'),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, r"added_tokens_decoder\.x: the key must be"),
        ({"added_tokens_decoder": {"256": "[BOS]"}}, r'added_tokens_decoder\.256: needs "content"'),
        ({"added_tokens_decoder": {"512": {"content": "y"}}}, r"512: special ids are 256\.\.511"),
        ({"added_tokens_decoder": {"255": {"content": "y"}}}, r"255: special ids are 256\.\.511"),
        ({"added_tokens_decoder": {"256": {"content": "[BOS]"}}}, r"names no token .*<\|im_end\|>"),
    ],
)
def test_a_bad_config_is_refused_with_its_key(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(write_model(tmp_path, base64_lines(BYTES), config))


def test_two_specials_of_one_name_are_refused(tmp_path: Path) -> None:
    config = good_config()
    config["added_tokens_decoder"]["300"] = {"content": IM_END}
    with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' names both tokens 258 and 300"):
        Tokenizer.load(write_model(tmp_path, base64_lines(BYTES), config))


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_an_absent_file_is_named(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, base64_lines(BYTES), good_config())
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: No such file")):
        Tokenizer.load(tmp_path)
