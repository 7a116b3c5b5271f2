"""A model that says nothing but noise, in words: small, of random weights, its tokens what JSON is made of.

Its tokens are the bytes, JSON's marks in pairs, and the words of the schemas in `schemas.jsonl`, so that
a call takes some 30 tokens and not 150, and tokens cross the borders of JSON's parts as K2's own do.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from k2dist.checkpoint import random_tensors, write_checkpoint
from k2dist.config import published_config
from k2dist.text.tokenizer import CALL_END, K2_SPECIALS, SECTION_END, Tokenizer
from tests.service.conftest import ARCHITECTURE

_MARKS = ('{"', '":', '": ', '":"', '": "', '", "', '"}', "}}", '"]', '"}]', "true", "false", "null")
_MARKS += ('": {', '": [', '[{"', "functions", "functions.f:")
_WORD = re.compile(r"[ _]?[A-Za-z]+|[^\W\d_a-zA-Z]+|\d{2,4}")
_NUM_WORDS = 500
_CLOSING = frozenset({b'"', b'"}', b"}", b"]", b"}}", b'"]', b'"}]'})
_LONGER = frozenset(b" \n\t\\[{,0123456789")


def write_noise_model(model_dir: Path, schemas: str) -> None:
    """Legal up to tp 2."""
    words = Counter(word for word in _WORD.findall(schemas) if len(word.encode()) > 1 and word not in _MARKS)
    pieces = [*_MARKS, *(word for word, _ in words.most_common(_NUM_WORDS))]
    vocabulary = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in pieces)]
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


def ending_sampling(tokenizer: Tokenizer, **fields: Any) -> dict[str, Any]:
    """What makes noise end: closing tokens likelier, and those less that only make things longer."""
    base = range(tokenizer.num_base)
    closing = [i for i in base if tokenizer.token_bytes(i) in _CLOSING]
    closing += [tokenizer.special_id(CALL_END), tokenizer.special_id(SECTION_END)]
    longer = [i for i in base if tokenizer.token_bytes(i)[-1] in _LONGER]
    bias = {**dict.fromkeys(longer, -3.0), **dict.fromkeys(closing, 4.0)}
    return {"temperature": 1.0, "max_tokens": 160, "logit_bias": bias, **fields}
