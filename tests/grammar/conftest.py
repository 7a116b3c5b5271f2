"""181 schemas, a tokenizer of bytes, K2's own vocabulary where it is, and answers drawn from masks alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest

from k2dist.grammar import Grammars, GrammarState
from k2dist.text.tokenizer import K2_SPECIALS, Tokenizer, end_token_ids, read_vocabulary
from tests.grammar.noise_model import write_noise_model

SCHEMAS_FILE = Path(__file__).with_name("schemas.jsonl")


class Case(NamedTuple):
    name: str
    schema: dict[str, Any]


CASES = [Case(**json.loads(line)) for line in SCHEMAS_FILE.read_text().splitlines()]


def make_tokenizer(vocabulary: list[bytes]) -> Tokenizer:
    return Tokenizer(vocabulary, {len(vocabulary) + offset: name for offset, name in K2_SPECIALS.items()})


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The bytes, and a few longer tokens that cross the borders of JSON's parts."""
    longer = [
        b'{"',
        b'":',
        b'": "',
        b'", "',
        b'"}',
        b"}}",
        b"true",
        b"false",
        b"null",
        b" [",
        b"functions",
        b"\xd0\xb3",
    ]
    return make_tokenizer([*(bytes([byte]) for byte in range(256)), *longer])


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, end_token_ids(tokenizer, None))


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    """The bytes alone: where it has longer tokens, a grammar asks for them and for no other spelling."""
    return make_tokenizer([bytes([byte]) for byte in range(256)])


@pytest.fixture(scope="session")
def bytes_grammars(bytes_tokenizer: Tokenizer) -> Grammars:
    return Grammars(bytes_tokenizer, end_token_ids(bytes_tokenizer, None))


@pytest.fixture(scope="session")
def noise_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("noise")
    write_noise_model(model_dir, SCHEMAS_FILE.read_text())
    return model_dir


@pytest.fixture(scope="session")
def k2_tokenizer() -> Tokenizer:
    """Of K2's own vocabulary."""
    path = Path(__file__).resolve().parents[2] / "../shared/kimi/tiktoken.model"
    if not path.is_file():
        pytest.skip("K2's vocabulary, ../shared/kimi/tiktoken.model, is not beside this checkout")
    return make_tokenizer(read_vocabulary(path))


def allowed(grammars: Grammars, state: GrammarState) -> list[int]:
    """The ids of the mask, ascending."""
    mask = np.zeros(grammars.mask_bytes, dtype=np.uint8)
    state.mask_into(mask)
    assert not state.error, state.error
    ids: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return ids


CLOSING = (b'"', b'"}', b"}", b"]", b"}}")
SPINNING = (b" ", b"\n", b"\t", b"\\", *(b"%d" % digit for digit in range(10)))


def walk(
    tokenizer: Tokenizer,
    grammars: Grammars,
    state: GrammarState,
    draw: random.Random,
    *,
    max_tokens: int = 4000,
    look: Callable[[list[int]], object] = lambda _: None,
) -> list[int]:
    """An answer of random allowed tokens, closing ones likelier; without its end token."""
    taken: list[int] = []
    ends = end_token_ids(tokenizer, None)
    for _ in range(max_tokens):
        ids = allowed(grammars, state)
        look(ids)
        weights = [_weight(tokenizer, token_id) for token_id in ids]
        (token_id,) = draw.choices(ids, weights)
        state.advance(token_id)
        if token_id in ends:
            return taken
        taken.append(token_id)
    raise AssertionError(f"no end after {max_tokens} tokens: {tokenizer.decode(taken)[:200]!r}")


def _weight(tokenizer: Tokenizer, token_id: int) -> float:
    text = tokenizer.token_bytes(token_id)
    return 40.0 if text in CLOSING else 0.2 if text in SPINNING else 1.0


def check_valid(text: str, schema: Any) -> Any:
    """The value of JSON text that satisfies `schema`; each key of an object came once."""
    value = json.loads(text)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    return value
