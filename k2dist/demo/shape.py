"""The demo model's shape: Kimi-K2's `config.json` in every field, with small widths.

The awkward parts of K2 are kept: 192 rows in kv_a (not a multiple of 128), 12 experts, three of them a token,
one dense layer, YaRN with a hard step.
"""

from __future__ import annotations

import json
from pathlib import Path

from k2dist.config import read_architecture
from k2dist.config.architecture import Architecture

NUM_BASE_TOKENS = 768  # 256 bytes and 512 merges; 256 special tokens follow
CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": NUM_BASE_TOKENS,
    "eos_token_id": NUM_BASE_TOKENS + 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": NUM_BASE_TOKENS + 256,
}
GENERATION_CONFIG: dict[str, object] = {
    "max_length": 131072,
    "eos_token_id": NUM_BASE_TOKENS + 2,
}  # <|im_end|>


def write_configs(model_dir: Path) -> Architecture:
    """Write `config.json` and `generation_config.json`; the architecture they state."""
    model_dir.mkdir(parents=True, exist_ok=True)
    for name, config in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (model_dir / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return read_architecture(model_dir)
