"""The random model for benchmarks, at a size that a test can afford."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2dist.bench import random_model
from k2dist.bench.random_model import SHAPE, write_random_model
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.errors import UsageError
from k2dist.messages import Sampling
from k2dist.scheduler import Limits
from k2dist.text import Tokenizer

SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
}


def test_it_can_be_served_and_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "SHAPE", SHAPE | SMALL)
    architecture = write_random_model(tmp_path)
    assert architecture == read_architecture(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.text_bytes(tokenizer.encode("abcd")[0]) == b"abcd"
    with LocalWorld(tmp_path, limits=Limits(step_tokens=512, max_running=4), num_pages=4) as world:
        (output,) = world.generate([[1, 2, 3]], Sampling(temperature=0.0, max_tokens=2, ignore_eos=True))
    assert len(output.token_ids) == 2
    with pytest.raises(UsageError, match="holds a model already"):
        write_random_model(tmp_path)
