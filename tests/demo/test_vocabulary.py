"""The byte-pair learner, and the committed vocabulary."""

from collections import Counter
from pathlib import Path

import pytest

from k2dist.demo import MODEL_DIR
from k2dist.demo.vocabulary import NUM_MERGES, count_pieces, learn_vocabulary, write_vocabulary
from k2dist.text.tokenizer import IM_END, SECTION_BEGIN, Tokenizer, read_vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL_DIR)


def test_sizes(tokenizer: Tokenizer) -> None:
    assert (tokenizer.num_base, tokenizer.vocab_size) == (256 + NUM_MERGES, 1024)
    assert tokenizer.special_id(IM_END) == 770
    assert tokenizer.special_id(SECTION_BEGIN) == 779


@pytest.mark.parametrize(
    "text", ["Zürich", "naïve 東京 🌍\n\n", "12345", '{"city": "Oslo"}', "", " a  b\t", "<|im_end|>"]
)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(token_id < tokenizer.num_base for token_id in ids)


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    for token_id in range(256, tokenizer.num_base):
        assert not any(48 <= byte <= 57 for byte in tokenizer.token_bytes(token_id))
    assert len(tokenizer.encode("9071")) == 4


@pytest.mark.parametrize("name", ["Oslo", "Beijing", "Zaragoza", "Quxholm"])
def test_a_name_has_the_same_tokens_after_a_space(tokenizer: Tokenizer, name: str) -> None:
    assert tokenizer.encode(f" {name}") == tokenizer.encode(" ") + tokenizer.encode(name)


def test_a_merge_joins_two_earlier_tokens() -> None:
    known: set[bytes] = set()
    for rank, token in enumerate(read_vocabulary(MODEL_DIR / "tiktoken.model")):
        if rank >= 256:
            assert any(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        known.add(token)


def test_learning_does_not_depend_on_order_and_gives_nearly_the_committed_tokens(tmp_path: Path) -> None:
    pieces = count_pieces(1, num_conversations=2000)
    tokens = learn_vocabulary(pieces)
    assert tokens == learn_vocabulary(Counter(dict(reversed(pieces.items()))))
    # Not all of them: the committed one saw more conversations, of six phrasings fewer.
    assert len(set(tokens) & set(read_vocabulary(MODEL_DIR / "tiktoken.model"))) > 0.8 * len(tokens)
    write_vocabulary(tmp_path, tokens)
    config = "tokenizer_config.json"
    assert (tmp_path / config).read_bytes() == (MODEL_DIR / config).read_bytes()
    assert read_vocabulary(tmp_path / "tiktoken.model") == tokens


def test_too_small_a_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="more conversations"):
        learn_vocabulary(Counter({"hello": 3, " hello": 2}))
