"""Logits in float32 against an independent implementation, on the dequantised weights."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from k2dist.checkpoint import dequantise_block_fp8
from k2dist.config import Architecture
from tests.published_config import published_config

if TYPE_CHECKING:
    from tests.model.conftest import Rig

transformers = pytest.importorskip("transformers")


CONFIGS: dict[str, dict[str, Any]] = {
    "ragged-kv-a-12-experts-top-3": {},
    "384-experts-top-8": {
        "num_experts": 384,
        "top_k": 8,
        "moe_intermediate_size": 16,
        "num_layers": 2,
    },
    "yarn-64-no-dense-layer": {"factor": 64.0, "first_dense_layers": 0, "num_layers": 2},
    "three-dense-layers": {"first_dense_layers": 3, "num_layers": 5},
    "grouped-routing-two-shared": {
        "num_experts": 16,
        "num_groups": 4,
        "top_k_groups": 2,
        "top_k": 4,
        "num_shared_experts": 2,
        "routed_scale": 2.5,
        "model_type": "deepseek_v3",
    },
    "yarn-beta-fast-32-eps": {"factor": 40.0, "beta_fast": 32.0, "rms_norm_eps": 1e-3},
    "no-yarn-unquantised": {"yarn": None, "scale_block": None, "norm_top_k": False},
    "scale-block-128": {
        "scale_block": 128,
        "hidden_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
    },
}


def architecture_of(rig: Rig, name: str) -> Architecture:
    changes = dict(CONFIGS[name])
    if "factor" in changes or "beta_fast" in changes:
        changes["yarn"] = rig.yarn(changes.pop("factor", 32.0), changes.pop("beta_fast", 1.0))
    return rig.architecture(**changes)


def their_model(architecture: Architecture, published: dict[str, Tensor]) -> Any:
    """transformers' DeepseekV3ForCausalLM with these weights: experts are fused per layer there."""
    text = {**published_config(architecture), "model_type": "deepseek_v3", "torch_dtype": "float32"}
    text.pop("quantization_config", None)
    config = transformers.DeepseekV3Config(**text, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the weights
    weights: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if not name.endswith("_scale_inv"):
            scale = published.get(name + "_scale_inv")
            weights[name] = (
                tensor.float()
                if scale is None
                else dequantise_block_fp8(tensor, scale, architecture.scale_block)
            )
    for layer in range(architecture.first_dense_layers, architecture.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = [
            [weights.pop(f"{prefix}{e}.{name}_proj.weight") for name in ("gate", "up", "down")]
            for e in range(architecture.num_experts)
        ]
        weights[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in parts])
        weights[f"{prefix}down_proj"] = torch.stack([down for _, _, down in parts])
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(rig: Rig, name: str, seed: int) -> None:
    architecture = architecture_of(rig, name)
    published = rig.published(architecture, seed)
    model = their_model(architecture, published)
    rng = random.Random(seed)
    for num_tokens, prompt_len in ((1, 1), (17, 17), (90, 60), (400, 390)):
        world = rig.world(architecture, published)
        sequence = rig.sequence(architecture, num_tokens, prompt_len, 3, rng)
        ours = [world.step({0: rig.batch([rig.grant(sequence, 0, prompt_len)], 1)})[0]]
        if num_tokens > prompt_len:
            ours.append(world.step({0: rig.batch([rig.grant(sequence, prompt_len, num_tokens)], 1)})[0])
        with torch.inference_mode():
            theirs_TV = model(torch.tensor([sequence.tokens])).logits[0]
        off = (torch.cat(ours) - theirs_TV).abs().max() / theirs_TV.abs().max()
        assert off < 1e-4, f"{num_tokens} tokens: off by {off:.1e} of the largest logit"
