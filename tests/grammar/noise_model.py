"""A model that says nothing but noise, in words: small, of random weights, its tokens what JSON is made of.

Besides the bytes it has the pairs that the schemas in `schemas.jsonl` are best written with, and JSON's marks
together, so that a call takes some 30 tokens, tokens cross the borders of JSON's parts as K2's own do, and a
prompt that shows a tool is short.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from k2dist.checkpoint import random_tensors, write_checkpoint
from k2dist.text.tokenizer import CALL_END, K2_SPECIALS, SECTION_END, Tokenizer
from tests.published_config import published_config
from tests.service.conftest import ARCHITECTURE

_MARKS = ('{"', '":', '": ', '":"', '": "', '", "', '", ', '"}', "}}", '"]', '"}]', '": {', '": [', '[{"')
_PIECE = re.compile(r" ?[^\W\d_]+| ?[^\s\w]+|\d{1,3}|_")
_NUM_PASSES, _PAIRS_OF_A_PASS = 30, 20
_CLOSING = frozenset({b'"', b'"}', b"}", b"]", b"}}", b'"]', b'"}]'})
_LONGER = frozenset(b" \n\t\\[{,0123456789")


def write_noise_model(model_dir: Path, schemas: str) -> None:
    """Legal up to tp 2."""
    longer = dict.fromkeys([*_learn_pairs(schemas), *(mark.encode() for mark in _MARKS)])
    vocabulary = [*(bytes([byte]) for byte in range(256)), *longer]
    num_base = len(vocabulary)
    architecture = replace(
        ARCHITECTURE,
        num_experts=4,
        top_k=2,
        num_shared_experts=2,
        vocab_size=-(-(num_base + 256) // 128) * 128,
        bos_token_id=num_base,
        eos_token_ids=(num_base + 1,),
    )
    (model_dir / "config.json").write_text(json.dumps(published_config(architecture)))
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": num_base + 2}))
    ranks = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(vocabulary))
    (model_dir / "tiktoken.model").write_text("".join(ranks))
    specials = {str(num_base + offset): {"content": name} for offset, name in K2_SPECIALS.items()}
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": specials}))
    write_checkpoint(model_dir, architecture, random_tensors(architecture, seed=1))


def _learn_pairs(text: str) -> Iterator[bytes]:
    """Those that come most often, in the order in which they are to be merged."""
    words = Counter(tuple(bytes([byte]) for byte in piece.encode()) for piece in _PIECE.findall(text))
    for _ in range(_NUM_PASSES):
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        pairs = {
            first + second: (first, second) for (first, second), _ in counts.most_common(_PAIRS_OF_A_PASS)
        }
        yield from pairs
        words = Counter({_merged(word, {*pairs.values()}): count for word, count in words.items()})


def _merged(word: tuple[bytes, ...], pairs: Set[tuple[bytes, bytes]]) -> tuple[bytes, ...]:
    merged: list[bytes] = []
    for token in word:
        if merged and (merged[-1], token) in pairs:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


def ending_sampling(tokenizer: Tokenizer, **fields: Any) -> dict[str, Any]:
    """What makes noise end: closing tokens likelier, and those less that only make things longer."""
    base = range(tokenizer.num_base)
    closing = [i for i in base if tokenizer.token_bytes(i) in _CLOSING]
    closing += [tokenizer.special_id(CALL_END), tokenizer.special_id(SECTION_END)]
    longer = [i for i in base if tokenizer.token_bytes(i)[-1] in _LONGER]
    bias = {**dict.fromkeys(longer, -3.0), **dict.fromkeys(closing, 4.0)}
    return {"temperature": 1.0, "max_tokens": 160, "logit_bias": bias, **fields}
