"""The reference's mathematics in a library's order: one call for all rows, whatever order that takes.

What the benchmark sets the same bits against, and no part of the product: a row's bits depend on its company
here. Weights lie as the reference's do; results are rounded where the reference rounds.

Legend: T rows, N outputs, K inputs, M pairs of row and expert, e slots, H heads, D width of a row or a key,
L latent, V value and F MLP width, R decode rows, S keys, C cache places, P pages.
"""

from __future__ import annotations

import dataclasses

import torch
from k2kernels import GroupedLinear, KernelSet, Linear, QuantisedRows
from k2kernels.attend import read_pages
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu


def library_kernels(base: KernelSet) -> KernelSet:
    """`base`, which is the reference, with every sum left to torch; the router's choice keeps its order."""
    assert base.name == "reference", f"weights laid out as the reference does, not as {base.name}"
    return dataclasses.replace(
        base,
        name="library",
        fp8_gemm=_linear,
        grouped_gemm=_grouped,
        linear_bf16=lambda x_TK, w_NK, out_dtype: linear(x_TK.float(), w_NK).to(out_dtype),
        router_logits=lambda x_TD, w_ED: linear(x_TD.float(), w_ED),
        weighted_sum=_weighted_sum,
        absorb=lambda x_THK, w_HKN: torch.einsum("thk,hkn->thn", x_THK.float(), w_HKN).to(x_THK.dtype),
        mla_decode=_decode,
        mla_prefill=_prefill,
        rmsnorm=_rmsnorm,
        swiglu=_swiglu,
    )


def _linear(x: Tensor | QuantisedRows, w: Linear, out_dtype: torch.dtype) -> Tensor:
    return linear(x.float(), w.w_NK).to(out_dtype)


def _grouped(x: Tensor | QuantisedRows, counts_e: Tensor, w: GroupedLinear, out_dtype: torch.dtype) -> Tensor:
    parts = x.float().split(counts_e.tolist())
    y_MN = [linear(part, slot.w_NK) for part, slot in zip(parts, w.slots, strict=True)]
    return torch.cat(y_MN).to(out_dtype) if y_MN else torch.empty(0, w.num_outputs, dtype=out_dtype)


def _weighted_sum(out_TKD: Tensor, weight_TK: Tensor, shared_TD: Tensor, out_dtype: torch.dtype) -> Tensor:
    return ((out_TKD.float() * weight_TK[:, :, None]).sum(1) + shared_TD).to(out_dtype)


def _decode(
    q_RHD: Tensor,
    cache_CD: Tensor,
    page_RP: Tensor,
    page_tokens: int,
    length_R: Tensor,
    latent_width: int,
    scale: float,
) -> Tensor:
    num_keys = int(length_R.max())
    key_RSD = read_pages(cache_CD, page_RP, page_tokens, length_R, num_keys)
    is_seen_R1S = (torch.arange(num_keys) < length_R[:, None])[:, None]
    score_RHS = torch.bmm(q_RHD.float(), key_RSD.transpose(1, 2)) * scale
    share_RHS = score_RHS.masked_fill_(~is_seen_R1S, -torch.inf).softmax(-1)
    return torch.bmm(share_RHS, key_RSD[..., :latent_width]).to(q_RHD.dtype)


def _prefill(
    q_THD: Tensor,
    cache_CD: Tensor,
    page_P: Tensor,
    page_tokens: int,
    start: int,
    w_uk_HNL: Tensor,
    w_uv_HLV: Tensor,
    scale: float,
) -> Tensor:
    num_rows, num_keys = len(q_THD), start + len(q_THD)
    key_SD = read_pages(cache_CD, page_P[None], page_tokens, torch.tensor([num_keys]), num_keys)[0]
    latent_SL, rope_SD = key_SD.split([w_uk_HNL.shape[2], key_SD.shape[1] - w_uk_HNL.shape[2]], dim=1)
    nope_HSN = (latent_SL @ w_uk_HNL.transpose(1, 2)).to(q_THD.dtype).float()
    value_HSV = (latent_SL @ w_uv_HLV).to(q_THD.dtype).float()
    key_HSD = torch.cat((nope_HSN, rope_SD.expand(len(nope_HSN), -1, -1)), dim=-1)
    is_seen_TS = torch.arange(num_keys) <= torch.arange(start, start + num_rows)[:, None]
    out_HTV = scaled_dot_product_attention(
        q_THD.float().transpose(0, 1)[None], key_HSD[None], value_HSV[None], is_seen_TS, scale=scale
    )[0]
    return out_HTV.transpose(0, 1).to(q_THD.dtype)


def _rmsnorm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32_TD = x_TD.float()
    rstd_T1 = torch.rsqrt(x32_TD.square().mean(-1, keepdim=True) + eps)
    return (x32_TD * rstd_T1).to(x_TD.dtype) * weight_D


def _swiglu(h_TG: Tensor) -> Tensor:
    gate_TF, up_TF = h_TG.float().chunk(2, dim=-1)
    return (silu(gate_TF) * up_TF).to(h_TG.dtype)
