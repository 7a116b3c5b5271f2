"""Every op's case as a call of a kernel set on random data, and the same tensors for its peers.

Only sizes come from the case. Numbers are random: zeros run faster than they should. Shapes as in each op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from k2kernels import (
    KernelSet,
    Rule,
    StoredWeight,
    absorb,
    act_quant,
    fp8_gemm,
    grouped_gemm,
    latent_write,
    linear_bf16,
    mla_decode,
    mla_prefill,
    rmsnorm,
    rope,
    router_logits,
    router_topk,
    swiglu,
    swiglu_quant,
    weighted_sum,
)

BLOCK = 128
PAGE_TOKENS = 64
SOFTMAX_SCALE = 0.1309  # K2's: 192^-0.5 with YaRN's temperature twice


@dataclass(frozen=True, slots=True)
class Work:
    """`run` computes the case; `tensors` are its inputs by the names of the op's contract."""

    run: Callable[[], object]
    tensors: Mapping[str, Any] = field(default_factory=dict)


Builder = Callable[[Any, KernelSet, torch.device], Work]


def bfloat16(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def stored(device: torch.device, *shape: int) -> StoredWeight:
    """Random e4m3 numbers of all sizes, none of them NaN, and their scales."""
    byte = torch.randint(0, 0x7F, shape, dtype=torch.uint8, device=device)
    byte |= torch.randint(0, 2, shape, dtype=torch.uint8, device=device) << 7
    scale_shape = tuple(-(-n // BLOCK) for n in shape)
    return StoredWeight(byte.view(torch.float8_e4m3fn), torch.rand(scale_shape, device=device) / 1e3, BLOCK)


def _act_quant(case: act_quant.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_TK = bfloat16(device, case.T, case.K)
    return Work(lambda: kernels.act_quant(x_TK, BLOCK))


def _fp8_gemm(case: fp8_gemm.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_TK, weight = bfloat16(device, case.T, case.K), stored(device, case.N, case.K)
    x, w = kernels.act_quant(x_TK, BLOCK), kernels.prepare_linear([weight])
    return Work(lambda: kernels.fp8_gemm(x, w, torch.bfloat16), {"x_TK": x_TK, "x": x, "weight": weight})


def _grouped_gemm(case: grouped_gemm.Case, kernels: KernelSet, device: torch.device) -> Work:
    """Rows spread as evenly as they go."""
    slots = [[stored(device, case.N, case.K)] for _ in range(case.e)]
    w = kernels.prepare_grouped(slots, case.N)
    counts = [case.M // case.e + (slot < case.M % case.e) for slot in range(case.e)]
    counts_e = torch.tensor(counts, device=device)
    x = kernels.act_quant(bfloat16(device, case.M, case.K), BLOCK)
    tensors = {"x": x, "counts": counts, "slots": slots}
    return Work(lambda: kernels.grouped_gemm(x, counts_e, w, torch.bfloat16), tensors)


def _linear_bf16(case: linear_bf16.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_TK, w_NK = bfloat16(device, case.T, case.K), bfloat16(device, case.N, case.K)
    w = kernels.prepare_plain(w_NK)
    return Work(lambda: kernels.linear_bf16(x_TK, w, torch.float32), {"x_TK": x_TK, "w_NK": w_NK})


def _router_logits(case: router_logits.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_TD, w_ED = bfloat16(device, case.T, case.D), torch.randn(case.E, case.D, device=device)
    return Work(lambda: kernels.router_logits(x_TD, w_ED), {"x_TD": x_TD, "w_ED": w_ED})


def _router_topk(case: router_topk.Case, kernels: KernelSet, device: torch.device) -> Work:
    logit_TE, bias_E = torch.randn(case.T, case.E, device=device), torch.randn(case.E, device=device) / 10
    rule = Rule(top_k=case.K, num_groups=1, top_k_groups=1, normalises=True, scale=2.827)
    return Work(lambda: kernels.router_topk(logit_TE, bias_E, rule), {"logit_TE": logit_TE, "top_k": case.K})


def _absorb(case: absorb.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_THK = bfloat16(device, case.T, case.H, case.K)
    heads = [stored(device, case.N, case.K) for _ in range(case.H)]
    w, w_HKN = kernels.prepare_values(heads), absorb.prepare_values(heads, torch.bfloat16)
    return Work(lambda: kernels.absorb(x_THK, w), {"x_THK": x_THK, "w_HKN": w_HKN})


def _pages(num_sequences: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shuffled tables, and a cache's worth of latents for them."""
    num_pages = -(-num_keys // PAGE_TOKENS)
    page_RP = torch.randperm(num_sequences * num_pages, device=device).view(num_sequences, num_pages)
    return page_RP, bfloat16(device, num_sequences * num_pages * PAGE_TOKENS, 576)


def _mla_decode(case: mla_decode.Case, kernels: KernelSet, device: torch.device) -> Work:
    page_RP, cache_CD = _pages(case.R, case.num_keys, device)
    q_RHD = bfloat16(device, case.R, case.H, case.D)
    length_R = torch.full((case.R,), case.num_keys, device=device)
    given = (q_RHD, cache_CD, page_RP, PAGE_TOKENS, length_R, case.L, SOFTMAX_SCALE)
    tensors = {"q_RHD": q_RHD, "cache_CD": cache_CD, "page_RP": page_RP, "length_R": length_R, "L": case.L}
    return Work(lambda: kernels.mla_decode(*given), tensors)


def _mla_prefill(case: mla_prefill.Case, kernels: KernelSet, device: torch.device) -> Work:
    page_RP, cache_CD = _pages(1, case.start + case.T, device)
    q_THD = bfloat16(device, case.T, case.H, case.N + case.R)
    w_uk = kernels.prepare_keys([stored(device, case.N, case.L) for _ in range(case.H)])
    w_uv = kernels.prepare_values([stored(device, case.V, case.L) for _ in range(case.H)])
    given = (q_THD, cache_CD, page_RP[0], PAGE_TOKENS, case.start, w_uk, w_uv, SOFTMAX_SCALE)
    tensors = {"q_THD": q_THD, "num_keys": case.start + case.T, "start": case.start, "V": case.V}
    return Work(lambda: kernels.mla_prefill(*given), tensors)


def _latent_write(case: latent_write.Case, kernels: KernelSet, device: torch.device) -> Work:
    cache_CD = bfloat16(device, 4 * case.T, case.L + case.R)
    place_T = torch.randperm(4 * case.T, device=device)[: case.T]
    latent_TL, key_TR = bfloat16(device, case.T, case.L), bfloat16(device, case.T, case.R)
    return Work(lambda: kernels.latent_write_(cache_CD, place_T, latent_TL, key_TR))


def _rmsnorm(case: rmsnorm.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_TD, weight_D = bfloat16(device, case.T, case.D), bfloat16(device, case.D)
    return Work(lambda: kernels.rmsnorm(x_TD, weight_D, 1e-6), {"x_TD": x_TD, "weight_D": weight_D})


def _rope(case: rope.Case, kernels: KernelSet, device: torch.device) -> Work:
    x_THR = bfloat16(device, case.T, case.H, case.R)
    cos_TF, sin_TF = (torch.rand(case.T, case.R // 2, device=device) for _ in range(2))
    return Work(lambda: kernels.rope(x_THR, cos_TF, sin_TF))


def _swiglu(case: swiglu.Case, kernels: KernelSet, device: torch.device) -> Work:
    h_TG = bfloat16(device, case.T, 2 * case.F)
    return Work(lambda: kernels.swiglu(h_TG), {"h_TG": h_TG})


def _swiglu_quant(case: swiglu_quant.Case, kernels: KernelSet, device: torch.device) -> Work:
    h_TG = bfloat16(device, case.T, 2 * case.F)
    return Work(lambda: kernels.swiglu_quant(h_TG, BLOCK))


def _weighted_sum(case: weighted_sum.Case, kernels: KernelSet, device: torch.device) -> Work:
    out_TKD, weight_TK = bfloat16(device, case.T, case.K, case.D), torch.rand(case.T, case.K, device=device)
    shared_TD = torch.randn(case.T, case.D, device=device)
    return Work(lambda: kernels.weighted_sum(out_TKD, weight_TK, shared_TD, torch.bfloat16))


@dataclass(frozen=True, slots=True)
class Op:
    """One file of `k2kernels`: its cases and cost, and how to make a call of a case."""

    module: ModuleType
    build: Builder
    is_e4m3: bool = False


OPS = {
    "fp8_gemm": Op(fp8_gemm, _fp8_gemm, is_e4m3=True),
    "grouped_gemm": Op(grouped_gemm, _grouped_gemm, is_e4m3=True),
    "mla_decode": Op(mla_decode, _mla_decode),
    "mla_prefill": Op(mla_prefill, _mla_prefill),
    "absorb": Op(absorb, _absorb),
    "linear_bf16": Op(linear_bf16, _linear_bf16),
    "router_logits": Op(router_logits, _router_logits),
    "router_topk": Op(router_topk, _router_topk),
    "act_quant": Op(act_quant, _act_quant),
    "swiglu": Op(swiglu, _swiglu),
    "swiglu_quant": Op(swiglu_quant, _swiglu_quant),
    "rmsnorm": Op(rmsnorm, _rmsnorm),
    "rope": Op(rope, _rope),
    "weighted_sum": Op(weighted_sum, _weighted_sum),
    "latent_write": Op(latent_write, _latent_write),
}

__all__ = ["BLOCK", "OPS", "PAGE_TOKENS", "SOFTMAX_SCALE", "Op", "Work"]
