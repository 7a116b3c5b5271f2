"""One decoder layer in float64, written out plainly: what the kernels' own results are held against.

It shares no code with the kernels. Where the served arithmetic keeps a result in bfloat16 or quantises
activations this rounds too, so what is left is the rounding of one half layer. No pages, no tiles, no tp: the
tensors are those of one rank, as published, and `architecture` has that rank's number of heads.

T tokens, S query rows among them, h heads, D hidden width.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2; DeepSeek-V3's, arXiv:2412.19437, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from k2dist.checkpoint import dequantise_block_fp8
from k2dist.config import Architecture
from k2dist.model.yarn import inv_freq, rope_table
from k2dist.parallel.published import SCALE_SUFFIX

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


class PlainLayer:
    """Layer `layer` of what `tensors` holds. `is_served`: bfloat16 and W8A8, else exact on these weights."""

    def __init__(
        self, tensors: Mapping[str, Tensor], architecture: Architecture, layer: int, *, is_served: bool
    ) -> None:
        self._tensors = tensors
        self._architecture = architecture
        self._prefix = f"model.layers.{layer}."
        self._is_served = is_served

    def attention_input(self, h_TD: Tensor) -> Tensor:
        return self._norm(h_TD, "input_layernorm", self._architecture.rms_norm_eps)

    def mlp_input(self, h_TD: Tensor) -> Tensor:
        return self._norm(h_TD, "post_attention_layernorm", self._architecture.rms_norm_eps)

    def attention(self, x_TD: Tensor, first_row: int = 0) -> Tensor:
        """Attention's output for rows from `first_row` on, of the normed stream: [S, D], not rounded."""
        a = self._architecture
        q_latent = self._norm(
            self._linear(x_TD, "self_attn.q_a_proj"), "self_attn.q_a_layernorm", a.inner_norm_eps
        )
        q_ThD = self._linear(q_latent, "self_attn.q_b_proj").unflatten(-1, (-1, a.qk_head_dim))
        latent_and_key = self._linear(x_TD, "self_attn.kv_a_proj_with_mqa")
        latent, key = latent_and_key.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        latent = self._norm(latent, "self_attn.kv_a_layernorm", a.inner_norm_eps)
        kv = self._rounded(latent @ self._weight("self_attn.kv_b_proj", x_TD.device).T)
        k_nope, value = kv.unflatten(-1, (a.num_heads, -1)).split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)
        key_ThR = self._turned(key[:, None]).expand(-1, a.num_heads, -1)
        q_nope, q_rope = q_ThD.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        q_ThD = torch.cat((q_nope, self._turned(q_rope)), dim=-1)[first_row:]
        k_ThD = torch.cat((k_nope, key_ThR), dim=-1)
        score_hST = torch.einsum("shd,thd->hst", q_ThD, k_ThD) * a.softmax_scale
        later_ST = torch.ones_like(score_hST[0], dtype=torch.bool).triu(first_row + 1)
        share_hST = score_hST.masked_fill_(later_ST, -torch.inf).softmax(-1)
        out_ShV = self._rounded(torch.einsum("hst,thv->shv", share_hST, value))
        return self._quantised(out_ShV.flatten(1)) @ self._weight("self_attn.o_proj", x_TD.device).T

    def swiglu(self, x_TD: Tensor, name: str) -> Tensor:
        """The MLP called `name` ("mlp", "mlp.shared_experts", "mlp.experts.7"): [T, D], not rounded."""
        gate, up = self._linear(x_TD, f"{name}.gate_proj"), self._linear(x_TD, f"{name}.up_proj")
        inner = self._rounded(gate * gate.sigmoid() * up)
        return self._quantised(inner) @ self._weight(f"{name}.down_proj", x_TD.device).T

    def router_scores(self, x_TD: Tensor) -> Tensor:
        """Float64 [T, E], before the correction bias."""
        return (x_TD @ self._weight("mlp.gate", x_TD.device).T).sigmoid()

    @property
    def router_bias(self) -> Tensor:
        return self._tensors[f"{self._prefix}mlp.gate.e_score_correction_bias"].double()

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        weight = self._tensors[f"{self._prefix}{name}.weight"].double()
        return self._rounded(self._rounded(x / (x.square().mean(-1, keepdim=True) + eps).sqrt()) * weight)

    def _weight(self, name: str, device: torch.device) -> Tensor:
        """Float64, dequantised, on `device`: experts' may lie elsewhere than the stream."""
        w = self._tensors[f"{self._prefix}{name}.weight"]
        scale = self._tensors.get(f"{self._prefix}{name}.weight{SCALE_SUFFIX}")
        if scale is None:
            return w.to(device).double()
        assert self._architecture.scale_block is not None, f"{name} has scales"
        return dequantise_block_fp8(w.to(device), scale.to(device), self._architecture.scale_block).double()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._rounded(self._quantised(x) @ self._weight(name, x.device).T)

    def _quantised(self, x: Tensor) -> Tensor:
        """As a linear with scales reads it: e4m3 in groups of channels."""
        block = self._architecture.scale_block
        if block is None or not self._is_served:
            return x
        groups = []
        for group in x.split(block, dim=-1):
            scale = group.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / E4M3_MAX
            groups.append((group / scale).float().to(torch.float8_e4m3fn).double() * scale)
        return torch.cat(groups, dim=-1)

    def _turned(self, x_ThR: Tensor) -> Tensor:
        """Rotated by each position's angles: float32 products, as published, their cosines in float64."""
        angle_TF = torch.arange(len(x_ThR)).float()[:, None] * inv_freq(self._architecture)
        angle_TF = angle_TF.to(x_ThR.device).double()
        attention_factor = float(rope_table(self._architecture, 1).cos_PF[0, 0])
        pairs = torch.view_as_complex(x_ThR.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.exp(1j * angle_TF)[:, None]) * attention_factor
        return self._rounded(turned.flatten(-2))

    def _rounded(self, x: Tensor) -> Tensor:
        """Where the served arithmetic keeps a result."""
        return x.bfloat16().double() if self._is_served else x
