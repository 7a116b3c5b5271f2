"""Learn the demo model's byte-pair vocabulary: 256 bytes and 512 merges, then K2's 256 special tokens.

    python -m k2dist.demo.vocabulary DIR      writes tiktoken.model and tokenizer_config.json

Merges come in two rounds. The first joins letters inside words; the second joins a whole word to the space
or sign before it. So a rare name has the same tokens wherever it stands, which makes copying it easy, while
common words cost one token. Digits are never joined. Source: Sennrich et al. 2016, arXiv:1508.07909.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import regex

from k2dist.demo import corpus, names
from k2dist.text.chat import render
from k2dist.text.tokenizer import CONFIG_FILE, K2_SPECIALS, NUM_SPECIALS, PATTERN, VOCABULARY_FILE

NUM_MERGES = 512
_NUM_JOINED = 120  # of the merges, those of the second round
_VISIBLE = frozenset((11, 12, 13, 14, 15))  # tool marks: K2 lists them as special = false


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_vocabulary(arguments.out, learn_vocabulary(count_pieces(arguments.seed)))


def count_pieces(seed: int, num_conversations: int = 4000) -> Counter[str]:
    """How often each piece of K2's pre-tokenisation stands in the corpus, real names left out.

    Real names would win tokens of their own, which those held out from training then lack.
    """
    pieces: Counter[str] = Counter()
    pattern = regex.compile(PATTERN, regex.V1)
    for conversation in islice(corpus.conversations(seed), num_conversations):
        for fragment in render(conversation.messages, conversation.tools, add_generation_prompt=False):
            if not fragment.is_control:
                pieces.update(pattern.findall(fragment.text))
    real = {word for name in (*names.CITIES, *names.CAPITALS) for word in name.split()}
    return Counter({piece: count for piece, count in pieces.items() if _word(piece)[1] not in real})


def learn_vocabulary(pieces: Counter[str]) -> list[bytes]:
    """Tokens by rank: the 256 bytes, then `NUM_MERGES` merges."""
    inner: Counter[bytes] = Counter()
    for piece, count in pieces.items():
        for part in _word(piece):
            if part and not any(character.isdigit() for character in part):
                inner[part.encode()] += count
    tokens = [bytes((byte,)) for byte in range(256)]
    tokens += _merges(inner, NUM_MERGES - _NUM_JOINED)
    known = set(tokens)
    joined = [
        (count, piece.encode())
        for piece, count in pieces.items()
        if _is_joinable(*_word(piece)) and piece.encode() not in known
        if all(part.encode() in known for part in _word(piece))
    ]
    tokens += [piece for _, piece in sorted(joined, key=lambda entry: (-entry[0], entry[1]))[:_NUM_JOINED]]
    if len(tokens) != 256 + NUM_MERGES:
        raise ValueError(f"the corpus gave {len(tokens) - 256} merges, need {NUM_MERGES}: more conversations")
    return tokens


def _word(piece: str) -> tuple[str, str]:
    """A word piece as the sign before it and its letters; another piece as it is."""
    if len(piece) > 1 and not piece[0].isalpha() and piece[1].isalpha():
        return piece[0], piece[1:]
    return "", piece


def _is_joinable(before: str, word: str) -> bool:
    """Short words stay apart from the space before them: they begin names ("Be" in "Beijing")."""
    return not before or len(word) >= (2 if word.islower() else 4)


def _merges(counts: Counter[bytes], num_merges: int) -> list[bytes]:
    words = {word: [bytes((byte,)) for byte in word] for word in counts}
    merged: list[bytes] = []
    known: set[bytes] = set()
    while len(merged) < num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        (left, right), _ = min(pairs.items(), key=lambda entry: (-entry[1], entry[0]))
        if left + right not in known:
            merged.append(left + right)
            known.add(left + right)
        for word, parts in words.items():
            if len(parts) > 1 and left + right in word:
                words[word] = _join(parts, left, right)
    return merged


def _join(parts: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    joined: list[bytes] = []
    for part in parts:
        if joined and joined[-1] == left and part == right:
            joined[-1] = left + right
        else:
            joined.append(part)
    return joined


def write_vocabulary(model_dir: Path, tokens: list[bytes]) -> None:
    """`tiktoken.model` and `tokenizer_config.json` as K2 has them, specials at the same offsets."""
    model_dir.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (model_dir / VOCABULARY_FILE).write_text("".join(lines), encoding="ascii")
    added = {
        str(len(tokens) + offset): {
            "content": K2_SPECIALS.get(offset, f"<|reserved_token_{len(tokens) + offset}|>"),
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": offset not in _VISIBLE,
        }
        for offset in range(NUM_SPECIALS)
        if offset in K2_SPECIALS
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": 1e30,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (model_dir / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_vocabulary(source_dir: Path, model_dir: Path) -> None:
    """The two files of another directory, as they are."""
    for name in (VOCABULARY_FILE, CONFIG_FILE):
        (model_dir / name).write_bytes((source_dir / name).read_bytes())


if __name__ == "__main__":
    main()
