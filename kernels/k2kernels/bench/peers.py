"""The same case by others: torch's own op, and other projects' kernels where they are installed.

A peer gets tensors in its own layout, made before the clock starts, and computes what the op computes, or
what its name says is missing. None of the other projects' calls has run on a machine of ours yet: what fails
is reported with its error and the bench goes on.

    DeepGEMM    deepseek-ai/DeepGEMM        FlashInfer  flashinfer-ai/flashinfer
    FlashMLA    deepseek-ai/FlashMLA        vLLM        vllm-project/vllm, its Triton block-FP8 matmul
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from k2kernels import QuantisedRows, StoredWeight
from k2kernels.bench.work import PAGE_TOKENS, SOFTMAX_SCALE, Work
from k2kernels.fp8_gemm import dequantise

Call = Callable[[], object]
# What a library that is there and does not take our case raises.
REFUSALS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
MOST_SCORES = 1 << 31  # torch's attention may write them all


@dataclass(frozen=True, slots=True)
class Peer:
    """`module` must be there; `prepare` gives the call to time, or None for a case that it is not for."""

    name: str
    module: str
    prepare: Callable[[Work], Call | None]

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None


def peers_of(op: str, device: torch.device) -> Iterator[Peer]:
    """Those for `op` that run on `device`, installed or not."""
    for peer in _PEERS.get(op, ()):
        if device.type == "cuda" or (peer.module == "torch" and peer.name not in _CUDA_ONLY):
            yield peer


def _stored(work: Work) -> tuple[QuantisedRows, Tensor, Tensor]:
    x, weight = work.tensors["x"], work.tensors["weight"]
    assert isinstance(x, QuantisedRows)
    assert isinstance(weight, StoredWeight)
    assert weight.scale_nk is not None
    return x, weight.w_NK, weight.scale_nk


def _torch_scaled_mm(work: Work) -> Call:
    x, w_NK, scale_nk = _stored(work)
    x_scale = x.scale_Tk.t().contiguous().t()  # the token runs fastest
    return lambda: torch._scaled_mm(
        x.q_TK, w_NK.t(), scale_a=x_scale, scale_b=scale_nk.t(), out_dtype=torch.bfloat16
    )


def _torch_linear(work: Work) -> Call:
    x_TK, w_NK = work.tensors["x_TK"], dequantise(work.tensors["weight"]).to(torch.bfloat16)
    return lambda: x_TK @ w_NK.t()


def _vllm_linear(work: Work) -> Call:
    x, w_NK, scale_nk = _stored(work)
    utils = import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    matmul: Any = utils.w8a8_triton_block_scaled_mm
    return lambda: matmul(x.q_TK, w_NK, x.scale_Tk, scale_nk, [128, 128], torch.bfloat16)


def _deep_gemm_linear(work: Work) -> Call:
    x, w_NK, scale_nk = _stored(work)
    deep_gemm = import_module("deep_gemm")
    x_scale = deep_gemm.get_mn_major_tma_aligned_tensor(x.scale_Tk)
    out = torch.empty(len(x.q_TK), len(w_NK), dtype=torch.bfloat16, device=w_NK.device)
    return lambda: deep_gemm.fp8_gemm_nt((x.q_TK, x_scale), (w_NK, scale_nk), out)


def _deep_gemm_grouped(work: Work) -> Call:
    """Its contiguous form: the rows of an expert are filled up to whole tiles."""
    deep_gemm = import_module("deep_gemm")
    tile = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
    x, counts = work.tensors["x"], work.tensors["counts"]
    slots = [slot[0] for slot in work.tensors["slots"]]
    w_eNK = torch.stack([slot.w_NK.view(torch.uint8) for slot in slots]).view(torch.float8_e4m3fn)
    scale_enk = torch.stack([slot.scale_nk for slot in slots])
    padded = [-(-count // tile) * tile for count in counts]
    slot_M = torch.arange(len(counts), device=w_eNK.device).repeat_interleave(
        torch.tensor(padded, device=w_eNK.device)
    )
    row_M = torch.arange(len(slot_M), device=w_eNK.device) % max(1, len(x.q_TK))
    rows, out = x[row_M], torch.empty(len(slot_M), w_eNK.shape[1], dtype=torch.bfloat16, device=w_eNK.device)
    x_scale = deep_gemm.get_mn_major_tma_aligned_tensor(rows.scale_Tk)
    slot_32 = slot_M.to(torch.int32)
    return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (rows.q_TK, x_scale), (w_eNK, scale_enk), out, slot_32
    )


def _flash_mla(work: Work) -> Call:
    flash_mla, given = import_module("flash_mla"), work.tensors
    q_RHD, cache_CD = given["q_RHD"], given["cache_CD"]
    page, length = given["page_RP"].to(torch.int32), given["length_R"].to(torch.int32)
    metadata, num_splits = flash_mla.get_mla_metadata(length, q_RHD.shape[1], 1)
    cache = cache_CD.view(-1, PAGE_TOKENS, 1, cache_CD.shape[1])
    return lambda: flash_mla.flash_mla_with_kvcache(
        q_RHD[:, None],
        cache,
        page,
        length,
        given["L"],
        metadata,
        num_splits,
        softmax_scale=SOFTMAX_SCALE,
        causal=True,
    )


def _flashinfer(work: Work) -> Call:
    flashinfer, given = import_module("flashinfer"), work.tensors
    q_RHD, width, device = given["q_RHD"], given["L"], given["q_RHD"].device
    num_rows, num_heads, _ = q_RHD.shape
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=device)
    )
    row_R = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    page_RP = given["page_RP"].to(torch.int32)
    wrapper.plan(
        row_R,
        row_R * page_RP.shape[1],
        page_RP.flatten(),
        given["length_R"].to(torch.int32),
        num_heads,
        width,
        q_RHD.shape[2] - width,
        PAGE_TOKENS,
        True,
        SOFTMAX_SCALE,
        q_RHD.dtype,
        q_RHD.dtype,
    )
    cache = given["cache_CD"].view(-1, PAGE_TOKENS, q_RHD.shape[2])
    latent, key = cache[..., :width], cache[..., width:]
    return lambda: wrapper.run(q_RHD[..., :width], q_RHD[..., width:], latent, key)


def _torch_decode(work: Work) -> Call | None:
    """On keys that lie in one piece, as no cache of pages has them."""
    given = work.tensors
    q_RHD, length = given["q_RHD"], int(given["length_R"].max()) if len(given["length_R"]) else 0
    num_rows, num_heads, width = q_RHD.shape
    if num_rows * num_heads * length > MOST_SCORES:
        return None
    page_CD = given["cache_CD"].view(-1, PAGE_TOKENS, width)
    key_RSD = page_CD[given["page_RP"]].flatten(1, 2)[:, None, :length]
    value_RSL, q = key_RSD[..., : given["L"]], q_RHD[:, None]
    return lambda: functional.scaled_dot_product_attention(q, key_RSD, value_RSL, scale=SOFTMAX_SCALE)


def _torch_prefill(work: Work) -> Call | None:
    """On keys and values that are decompressed already, and without a prefix."""
    given = work.tensors
    q_THD, num_keys, width = given["q_THD"], given["num_keys"], given["V"]
    if given["start"] or q_THD.shape[0] * q_THD.shape[1] * num_keys > MOST_SCORES:
        return None
    q = q_THD.transpose(0, 1)[None].contiguous()
    key, value = torch.randn_like(q), torch.randn_like(q[..., :width])
    return lambda: functional.scaled_dot_product_attention(q, key, value, is_causal=True, scale=SOFTMAX_SCALE)


def _torch_bmm(work: Work) -> Call:
    x_HTK, w_HKN = work.tensors["x_THK"].transpose(0, 1), work.tensors["w_HKN"]
    return lambda: torch.bmm(x_HTK, w_HKN)


def _torch_head(work: Work) -> Call:
    x_TK, w_NK = work.tensors["x_TK"], work.tensors["w_NK"]
    return lambda: x_TK @ w_NK.t()


def _torch_router(work: Work) -> Call:
    x_TD, w_ED = work.tensors["x_TD"].float(), work.tensors["w_ED"]
    return lambda: x_TD @ w_ED.t()


def _torch_topk(work: Work) -> Call:
    logit_TE, top_k = work.tensors["logit_TE"], work.tensors["top_k"]
    return lambda: logit_TE.sigmoid().topk(top_k, sorted=False)


def _torch_rmsnorm(work: Work) -> Call:
    x_TD, weight_D = work.tensors["x_TD"], work.tensors["weight_D"]
    return lambda: functional.rms_norm(x_TD, weight_D.shape, weight_D, 1e-6)


def _torch_swiglu(work: Work) -> Call:
    gate, up = work.tensors["h_TG"].chunk(2, dim=-1)
    return lambda: functional.silu(gate) * up


_CUDA_ONLY = {"torch._scaled_mm, blockwise"}
_PEERS = {
    "fp8_gemm": (
        Peer("torch._scaled_mm, blockwise", "torch", _torch_scaled_mm),
        Peer("torch matmul, bfloat16", "torch", _torch_linear),
        Peer("DeepGEMM", "deep_gemm", _deep_gemm_linear),
        Peer("vLLM, Triton", "vllm", _vllm_linear),
    ),
    "grouped_gemm": (Peer("DeepGEMM, contiguous", "deep_gemm", _deep_gemm_grouped),),
    "mla_decode": (
        Peer("torch sdpa, keys in one piece", "torch", _torch_decode),
        Peer("FlashMLA", "flash_mla", _flash_mla),
        Peer("FlashInfer", "flashinfer", _flashinfer),
    ),
    "mla_prefill": (Peer("torch sdpa, decompressed", "torch", _torch_prefill),),
    "absorb": (Peer("torch bmm", "torch", _torch_bmm),),
    "linear_bf16": (Peer("torch matmul, bfloat16", "torch", _torch_head),),
    "router_logits": (Peer("torch matmul, float32", "torch", _torch_router),),
    "router_topk": (Peer("torch sigmoid, topk", "torch", _torch_topk),),
    "rmsnorm": (Peer("torch rms_norm", "torch", _torch_rmsnorm),),
    "swiglu": (Peer("torch silu, mul", "torch", _torch_swiglu),),
}
