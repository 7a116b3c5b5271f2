"""A checkpoint in transformers, which shares nothing with this implementation: the second opinion.

Needs the extra `[train]`. Weights are dequantised; nothing else is float8, so this is what block-FP8 weights
alone cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def transformers_model(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> DeepseekV3ForCausalLM:
    """transformers' float32 model of `tensors` (by published name), whose experts it keeps stacked."""
    kept = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**kept)).float().eval()
    num_experts = model.config.n_routed_experts
    state = dict(tensors)
    for layer in range(model.config.first_k_dense_replace, model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        names = [f"{prefix}{expert}." for expert in range(num_experts)]
        gate_up = [
            torch.cat([state.pop(f"{name}gate_proj.weight"), state.pop(f"{name}up_proj.weight")])
            for name in names
        ]
        state[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
        state[f"{prefix}down_proj"] = torch.stack([state.pop(f"{name}down_proj.weight") for name in names])
    model.load_state_dict(state)
    return model
