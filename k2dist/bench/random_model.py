"""A model of 1.3 billion random weights in K2's shape, to run `k2dist bench offline` on without a real one.

Large enough that a step reads far more than any cache holds, small enough for a laptop. What it says means
nothing; its time and memory are those of a trained model of this shape.
"""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path

from k2dist.checkpoint import random_tensors, write_checkpoint
from k2dist.checkpoint.names import INDEX_NAME
from k2dist.config import Architecture, read_architecture
from k2dist.demo.shape import CONFIG
from k2dist.demo.vocabulary import write_vocabulary
from k2dist.errors import UsageError
from k2dist.text.tokenizer import NUM_SPECIALS

SEED = 1
_VOCABULARY = 32768
_NUM_BASE_TOKENS = _VOCABULARY - NUM_SPECIALS
# Where it differs from the demo's, whose other fields are K2's own.
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "vocab_size": _VOCABULARY,
    "bos_token_id": _NUM_BASE_TOKENS,
    "eos_token_id": _NUM_BASE_TOKENS + 1,
}


def write_random_model(model_dir: Path) -> Architecture:
    """Config, vocabulary and 1.37 GB of weights, always the same; 6 GB of memory while they are drawn.

    UsageError where `model_dir` holds a model already.
    """
    if (model_dir / INDEX_NAME).exists():
        raise UsageError(f"{model_dir}: holds a model already; give another directory, or remove it")
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(CONFIG | SHAPE, indent=2) + "\n")
    (model_dir / "generation_config.json").write_text(
        json.dumps({"eos_token_id": _NUM_BASE_TOKENS + 2}) + "\n"
    )
    write_vocabulary(model_dir, _tokens())
    architecture = read_architecture(model_dir)
    write_checkpoint(model_dir, architecture, random_tensors(architecture, SEED))
    return architecture


def _tokens() -> list[bytes]:
    """The bytes, then words of four letters."""
    letters = range(ord("a"), ord("z") + 1)
    words = (bytes(word) for word in product(letters, repeat=4))
    return [bytes((byte,)) for byte in range(256)] + list(islice(words, _NUM_BASE_TOKENS - 256))
