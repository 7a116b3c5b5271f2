"""`config.json` of an architecture, in the keys that Moonshot and DeepSeek publish."""

from __future__ import annotations

from k2dist.config.architecture import Architecture


def published_config(architecture: Architecture) -> dict[str, object]:
    """The JSON object from which `read_architecture` reads `architecture` again."""
    a = architecture
    config: dict[str, object] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": a.model_type,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "intermediate_size": a.intermediate_size,
        "moe_intermediate_size": a.moe_intermediate_size,
        "n_routed_experts": a.num_experts,
        "n_shared_experts": a.num_shared_experts,
        "num_experts_per_tok": a.top_k,
        "first_k_dense_replace": a.first_dense_layers,
        "moe_layer_freq": 1,
        "n_group": a.num_groups,
        "topk_group": a.top_k_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": a.norm_top_k,
        "routed_scaling_factor": a.routed_scale,
        "hidden_act": "silu",
        "rms_norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "rope_scaling": _rope_scaling(a),
        "max_position_embeddings": a.max_positions,
        "vocab_size": a.vocab_size,
        "bos_token_id": a.bos_token_id,
        "eos_token_id": a.eos_token_ids[0] if len(a.eos_token_ids) == 1 else list(a.eos_token_ids),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": a.num_mtp_layers,
        "torch_dtype": "bfloat16",
    }
    if a.scale_block is not None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [a.scale_block, a.scale_block],
        }
    return config


def _rope_scaling(a: Architecture) -> dict[str, object] | None:
    if a.yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": a.yarn.factor,
        "original_max_position_embeddings": a.yarn.original_max_positions,
        "beta_fast": a.yarn.beta_fast,
        "beta_slow": a.yarn.beta_slow,
        "mscale": a.yarn.mscale,
        "mscale_all_dim": a.yarn.mscale_all_dim,
    }
