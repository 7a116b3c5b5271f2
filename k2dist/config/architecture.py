"""The shape of one model: every dimension and constant of its arithmetic, as `config.json` states them.

Nothing here has a default that a checkpoint could contradict in silence: the values come from
`model_config.read_architecture`, or from a test that spells them out.
"""

from __future__ import annotations

import math

from k2dist.messages import Message


class Yarn(Message, frozen=True, kw_only=True):
    """How rotary frequencies are stretched for long contexts (config.json `rope_scaling`, type yarn).

    K2 has beta_fast = beta_slow = 1, DeepSeek-V3 32 and 1; taking one for the other ruins long contexts.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


class Architecture(Message, frozen=True, kw_only=True):
    """One model of the `kimi_k2` / `deepseek_v3` family. Widths and ranks are counts of features."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int  # of the dense layers
    moe_intermediate_size: int  # of one expert
    num_experts: int
    num_shared_experts: int  # run as one MLP of shared_width
    top_k: int
    first_dense_layers: int  # layers [0, first_dense_layers) have no experts
    num_groups: int
    top_k_groups: int
    norm_top_k: bool
    routed_scale: float  # multiplies the routed output, never the shared expert
    rms_norm_eps: float
    # Of the q_a and kv_a norms: the published code takes its class default, not the config.
    inner_norm_eps: float = 1e-6
    rope_theta: float
    yarn: Yarn | None
    max_positions: int
    vocab_size: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json together
    scale_block: int | None  # 128: block FP8 with one scale per 128 x 128 weights; None: bfloat16
    num_mtp_layers: int = 0  # layers after the last that only train or speculate; not loaded

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the normed latent, then the rotated key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_width(self) -> int:
        return self.moe_intermediate_size * self.num_shared_experts

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.first_dense_layers

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(192) times YaRN's temperature squared; the same in the absorbed form (k2_facts 2.4)."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        if self.yarn is None or self.yarn.factor <= 1.0:
            return scale
        temperature = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0
        return scale * temperature * temperature

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_dense_layers
