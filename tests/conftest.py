"""Shared by all tests: seeds that come from the test's id, one torch thread, and a small random model."""

import base64
import json
import random
import zlib
from pathlib import Path

import numpy
import pytest
import torch

torch.set_num_threads(1)

NUM_BASE_TOKENS = 256  # the bytes, without merges; 256 specials follow

TINY_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,  # with the 64 rotary rows kv_a is ragged: 192 = 1.5 scale blocks
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 131072,
    "vocab_size": NUM_BASE_TOKENS + 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": NUM_BASE_TOKENS,
    "eos_token_id": NUM_BASE_TOKENS + 1,
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "torch_dtype": "bfloat16",
}

# Offsets of the named specials from the end of the base vocabulary, as Kimi publishes them.
SPECIAL_OFFSETS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The same for the same test, different for different ones."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as Moonshot publishes it: K2's awkward bits, random weights, bytes for a vocabulary.

    Legal up to tp 4. The weights say nothing sensible.
    """
    from k2dist.checkpoint import random_tensors, write_checkpoint
    from k2dist.config import read_architecture

    model_dir = tmp_path_factory.mktemp("tiny-k2")
    _write_configs(model_dir)
    architecture = read_architecture(model_dir)
    write_checkpoint(model_dir, architecture, random_tensors(architecture, seed=1))
    return model_dir


@pytest.fixture(scope="session")
def skewed_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_dir`, but its routers choose experts 0, 1 and 2 for every row: all on rank 0 of four."""
    from k2dist.checkpoint import random_tensors, write_checkpoint
    from k2dist.config import read_architecture

    model_dir = tmp_path_factory.mktemp("skewed-k2")
    _write_configs(model_dir)
    architecture = read_architecture(model_dir)
    tensors = random_tensors(architecture, seed=1)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[: architecture.top_k] += 10.0
    write_checkpoint(model_dir, architecture, tensors)
    return model_dir


def _write_configs(model_dir: Path) -> None:
    """All that a model directory holds besides weights."""
    (model_dir / "config.json").write_text(json.dumps(TINY_CONFIG))
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": NUM_BASE_TOKENS + 2}))
    ranks = (f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(NUM_BASE_TOKENS))
    (model_dir / "tiktoken.model").write_text("\n".join(ranks) + "\n")
    specials = {
        str(NUM_BASE_TOKENS + offset): {"content": name, "special": True}
        for offset, name in SPECIAL_OFFSETS.items()
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": specials}))
