"""The demo model as it is trained: DeepseekV3's arithmetic in plain torch, fast on a CPU that has bfloat16.

Twin of transformers' `DeepseekV3ForCausalLM` for training alone: no cache, right-padded rows, the experts of
a layer stacked in one parameter; `tests/demo/test_trainee.py` compares the two. Weights are float32, matrix
products bfloat16 or float32, as `dtype` says.

B rows, S positions, T = B * S tokens, D hidden, H heads, E experts, F expert width, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from k2dist.config.architecture import Architecture

MAX_POSITIONS = 1024  # of a training row


class Trainee(nn.Module):
    """Parameters under their published names, but `mlp.experts.{gate,up,down}_proj` hold all experts."""

    def __init__(self, architecture: Architecture, *, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.architecture, self.dtype = architecture, dtype
        rng = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterDict()
        for name, shape in parameter_shapes(architecture).items():
            is_norm = len(shape) == 1
            value = torch.ones(shape) if is_norm else torch.randn(shape, generator=rng) * _spread(name, shape)
            self.weights[_key(name)] = nn.Parameter(value)
        num_layers, num_experts = architecture.num_layers, architecture.num_experts
        self.bias_LE: Tensor
        self.load_LE: Tensor
        self.register_buffer("bias_LE", torch.zeros(num_layers, num_experts))  # e_score_correction_bias
        self.register_buffer("load_LE", torch.zeros(num_layers, num_experts), persistent=False)
        self.turn_SR: Tensor
        self.register_buffer("turn_SR", _turns(architecture, MAX_POSITIONS), persistent=False)
        mask_SS = torch.full((MAX_POSITIONS, MAX_POSITIONS), -1e4, dtype=dtype).triu(1)
        self.mask_SS: Tensor
        self.register_buffer("mask_SS", mask_SS, persistent=False)

    def forward(self, token_BS: Tensor, keep_BS: Tensor | None = None) -> Tensor:
        """Float32 logits at the positions that the mask `keep_BS` names, [kept, vocabulary] row by row.

        Without a mask [T, vocabulary]. Past the last attention only kept positions are computed.
        """
        x_BSD = functional.embedding(token_BS, self.weight("model.embed_tokens.weight"))
        last = self.architecture.num_layers - 1
        for layer in range(last):
            prefix = f"model.layers.{layer}."
            heads_BSO = self._attention(self._norm(x_BSD, f"{prefix}input_layernorm"), f"{prefix}self_attn.")
            x_BSD = self._after_attention(x_BSD.flatten(0, 1), heads_BSO.flatten(0, 1), layer).view_as(x_BSD)
        prefix = f"model.layers.{last}."
        heads_BSO = self._attention(self._norm(x_BSD, f"{prefix}input_layernorm"), f"{prefix}self_attn.")
        x_TD, heads_TO = x_BSD.flatten(0, 1), heads_BSO.flatten(0, 1)
        if keep_BS is not None:
            kept = keep_BS.flatten().nonzero().squeeze(1)
            x_TD, heads_TO = x_TD.index_select(0, kept), heads_TO.index_select(0, kept)
        x_TD = self._after_attention(x_TD, heads_TO, last)
        return self._linear(self._norm(x_TD, "model.norm"), "lm_head").float()

    def _after_attention(self, x_TD: Tensor, heads_TO: Tensor, layer: int) -> Tensor:
        """The rest of a layer, in which every row is on its own."""
        prefix = f"model.layers.{layer}."
        x_TD = x_TD + self._linear(heads_TO, f"{prefix}self_attn.o_proj")
        h_TD = self._norm(x_TD, f"{prefix}post_attention_layernorm")
        if self.architecture.is_moe_layer(layer):
            return x_TD + self._moe(h_TD, layer)
        return x_TD + self._mlp(h_TD.to(self.dtype), f"{prefix}mlp.")

    def weight(self, name: str) -> Tensor:
        value: Tensor = self.weights[_key(name)]
        return value

    def published(self) -> dict[str, Tensor]:
        """Float32 tensors by published name, one entry to an expert, correction biases included."""
        tensors: dict[str, Tensor] = {}
        for name in parameter_shapes(self.architecture):
            value = self.weight(name).detach()
            before, mark, projection = name.partition("mlp.experts.")
            if mark:
                for expert, matrix in enumerate(value):
                    tensors[f"{before}mlp.experts.{expert}.{projection}.weight"] = matrix.clone()
            else:
                tensors[name] = value.clone()
        for layer in range(self.architecture.first_dense_layers, self.architecture.num_layers):
            tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = self.bias_LE[layer].clone()
        return tensors

    def take_published_(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite every weight and bias: the inverse of `published`. Other tensors are not read."""
        experts = range(self.architecture.num_experts)
        for name in parameter_shapes(self.architecture):
            before, mark, projection = name.partition("mlp.experts.")
            if mark:
                value = torch.stack([tensors[f"{before}{mark}{e}.{projection}.weight"] for e in experts])
            else:
                value = tensors[name]
            self.weight(name).data.copy_(value)
        for layer in range(self.architecture.first_dense_layers, self.architecture.num_layers):
            self.bias_LE[layer] = tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]

    def balance_(self, rate: float) -> Tensor:
        """Move the correction biases against the load since the last call; returns the greatest share.

        DeepSeek-V3 report, section 2.1.2: sign of the load's error times a rate, no auxiliary loss.
        """
        load_LE = self.load_LE[self.architecture.first_dense_layers :]
        share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp_min(1)
        error_LE = 1 / self.architecture.num_experts - share_LE
        self.bias_LE[self.architecture.first_dense_layers :] += rate * error_LE.sign()
        self.load_LE.zero_()
        return share_LE.max() * self.architecture.num_experts

    def _norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        weight = self.weight(f"{name}.weight")
        return functional.rms_norm(
            x, weight.shape, weight, self.architecture.rms_norm_eps if eps is None else eps
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x.to(self.dtype), self.weight(f"{name}.weight").to(self.dtype))

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = self._linear(x, f"{prefix}gate_proj"), self._linear(x, f"{prefix}up_proj")
        return self._linear(functional.silu(gate) * up, f"{prefix}down_proj")

    def _attention(self, x_BSD: Tensor, prefix: str) -> Tensor:
        a = self.architecture
        num_rows, num_positions, _ = x_BSD.shape
        x_BSD = x_BSD.to(self.dtype)
        eps = a.inner_norm_eps
        q = self._norm(self._linear(x_BSD, f"{prefix}q_a_proj").float(), f"{prefix}q_a_layernorm", eps)
        q_BSHC = self._linear(q, f"{prefix}q_b_proj").view(
            num_rows, num_positions, a.num_heads, a.qk_head_dim
        )
        q_nope, q_rope = q_BSHC.split((a.qk_nope_head_dim, a.qk_rope_head_dim), -1)
        latent, k_rope = self._linear(x_BSD, f"{prefix}kv_a_proj_with_mqa").split(
            (a.kv_lora_rank, a.qk_rope_head_dim), -1
        )
        latent = self._norm(latent.float(), f"{prefix}kv_a_layernorm", eps)
        kv_BSHC = self._linear(latent, f"{prefix}kv_b_proj").view(num_rows, num_positions, a.num_heads, -1)
        k_nope, v_BSHV = kv_BSHC.split((a.qk_nope_head_dim, a.v_head_dim), -1)
        k_rope = self._rotate(k_rope[:, :, None]).expand(-1, -1, a.num_heads, -1)
        q_BHSC = torch.cat((q_nope, self._rotate(q_rope)), -1).transpose(1, 2)
        k_BHSC = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        score = (q_BHSC * a.softmax_scale) @ k_BHSC.transpose(2, 3)
        score = score + self.mask_SS[:num_positions, :num_positions]
        out = score.softmax(-1) @ v_BSHV.transpose(1, 2)
        out_BSO: Tensor = out.transpose(1, 2).reshape(num_rows, num_positions, -1)
        return out_BSO

    def _rotate(self, x_BSHR: Tensor) -> Tensor:
        """Interleaved pairs turned by their position's angle (k2_facts 2.3)."""
        x = (
            torch.view_as_complex(x_BSHR.float().unflatten(-1, (-1, 2)))
            * self.turn_SR[: x_BSHR.shape[1], None]
        )
        return torch.view_as_real(x).flatten(-2).to(x_BSHR.dtype)

    def _moe(self, x_TD: Tensor, layer: int) -> Tensor:
        a, prefix = self.architecture, f"model.layers.{layer}.mlp."
        score_TE = functional.linear(x_TD, self.weight(f"{prefix}gate.weight")).sigmoid()
        expert_TK = (score_TE.detach() + self.bias_LE[layer]).topk(a.top_k, sorted=False).indices
        weight_TK = score_TE.gather(1, expert_TK)
        weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20) * a.routed_scale
        x_TD = x_TD.to(self.dtype)
        order_M = expert_TK.flatten().argsort(stable=True)
        counts = torch.bincount(expert_TK.flatten(), minlength=a.num_experts)
        if self.training:
            self.load_LE[layer] += counts
        rows_MD = x_TD.index_select(0, order_M // a.top_k)
        gate_EFD, up_EFD, down_EDF = (
            self.weight(f"{prefix}experts.{name}").to(self.dtype)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        outs = [
            functional.linear(
                functional.silu(functional.linear(rows, gate_EFD[e])) * functional.linear(rows, up_EFD[e]),
                down_EDF[e],
            )
            for e, rows in enumerate(rows_MD.split(counts.tolist()))
        ]
        out_MD = torch.cat(outs) * weight_TK.flatten()[order_M, None].to(self.dtype)
        routed_TD = torch.zeros_like(x_TD).index_add(0, order_M // a.top_k, out_MD)
        return routed_TD + self._mlp(x_TD, f"{prefix}shared_experts.")


def parameter_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every trained parameter of `Trainee` by name, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (a.hidden_size,),
            f"{prefix}post_attention_layernorm.weight": (a.hidden_size,),
            f"{prefix}self_attn.q_a_proj.weight": (a.q_lora_rank, a.hidden_size),
            f"{prefix}self_attn.q_a_layernorm.weight": (a.q_lora_rank,),
            f"{prefix}self_attn.q_b_proj.weight": (a.num_heads * a.qk_head_dim, a.q_lora_rank),
            f"{prefix}self_attn.kv_a_proj_with_mqa.weight": (a.latent_dim, a.hidden_size),
            f"{prefix}self_attn.kv_a_layernorm.weight": (a.kv_lora_rank,),
            f"{prefix}self_attn.kv_b_proj.weight": (
                a.num_heads * (a.qk_nope_head_dim + a.v_head_dim),
                a.kv_lora_rank,
            ),
            f"{prefix}self_attn.o_proj.weight": (a.hidden_size, a.num_heads * a.v_head_dim),
        }
        if not a.is_moe_layer(layer):
            shapes |= _mlp_shapes(f"{prefix}mlp.", a.hidden_size, a.intermediate_size)
            continue
        shapes[f"{prefix}mlp.gate.weight"] = (a.num_experts, a.hidden_size)
        shapes |= _mlp_shapes(f"{prefix}mlp.shared_experts.", a.hidden_size, a.shared_width)
        up_shape = (a.num_experts, a.moe_intermediate_size, a.hidden_size)
        shapes |= {
            f"{prefix}mlp.experts.gate_proj": up_shape,
            f"{prefix}mlp.experts.up_proj": up_shape,
            f"{prefix}mlp.experts.down_proj": (a.num_experts, a.hidden_size, a.moe_intermediate_size),
        }
    return shapes | {"model.norm.weight": (a.hidden_size,), "lm_head.weight": (a.vocab_size, a.hidden_size)}


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict's keys hold no dots


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a new matrix: activations keep their size, the residual grows slowly."""
    if name == "model.embed_tokens.weight":
        return 0.7  # a token must stay legible in the residual for later layers to copy it
    if name == "lm_head.weight" or name.endswith("gate.weight"):
        return 0.02
    is_into_residual = "o_proj" in name or "down_proj" in name
    return (0.2 if is_into_residual else 1.0) / math.sqrt(shape[-1])


def _turns(a: Architecture, num_positions: int) -> Tensor:
    """Each position's and pair's rotation as a complex number."""
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * rotation_frequencies(a)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotation_frequencies(a: Architecture) -> Tensor:
    """Radians per position of every rotary pair, float64, with YaRN's correction (k2_facts 2.4)."""
    index = torch.arange(a.qk_rope_head_dim // 2, dtype=torch.float64)
    frequency = a.rope_theta ** (-2 * index / a.qk_rope_head_dim)
    if a.yarn is not None:
        low, high = (
            a.qk_rope_head_dim
            * math.log(a.yarn.original_max_positions / (2 * math.pi * beta))
            / (2 * math.log(a.rope_theta))
            for beta in (a.yarn.beta_fast, a.yarn.beta_slow)
        )
        first, last = max(math.floor(low), 0), min(math.ceil(high), a.qk_rope_head_dim - 1)
        ramp = ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
        frequency = frequency * ((1 - ramp) + ramp / a.yarn.factor)
    return frequency
