"""Tokenizers for the text tests: K2's own, where its vocabulary is at hand, and a small made-up one."""

import json
from pathlib import Path

import pytest

from k2dist.text.tokenizer import K2_SPECIALS, Tokenizer

MERGES = (
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" w",
    b"or",
    b"ld",
    b" wor",
    b" world",
    b'{"',
    b'":',
    b'"}',
    b"\n\n",
)
HAN = "你".encode()


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """256 bytes, some merges (half a character; one over a border that pieces never cross), 256 specials."""
    vocabulary = [bytes((byte,)) for byte in range(256)] + [*MERGES, b"A" + HAN, HAN[:2], HAN]
    specials = {len(vocabulary) + offset: name for offset, name in K2_SPECIALS.items()}
    return Tokenizer(vocabulary, specials)


@pytest.fixture(scope="session")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """K2's tokenizer, from the published vocabulary beside the checkout."""
    published = Path(__file__).resolve().parents[2] / "../shared/kimi/tiktoken.model"
    if not published.exists():
        pytest.skip("K2's vocabulary, ../shared/kimi/tiktoken.model, is not beside this checkout")
    model_dir = tmp_path_factory.mktemp("kimi")
    (model_dir / "tiktoken.model").symlink_to(published.resolve())
    decoder = {str(163584 + offset): {"content": name} for offset, name in K2_SPECIALS.items()}
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return Tokenizer.load(model_dir)
