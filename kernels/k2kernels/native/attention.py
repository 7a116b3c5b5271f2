"""Attention on the paged latents, and their writing. Contracts: the files named like them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.native.arguments import cache_of, check
from k2kernels.native.caller import Caller
from k2kernels.native.layouts import PackedKeys
from k2kernels.native.library import Decode, Prefill
from k2kernels.native.packed import PackedLinear

HEADS_MAX = 256


@dataclass(frozen=True, slots=True)
class Attention:
    call: Caller

    def mla_decode(
        self,
        q_RHD: Tensor,
        cache_CD: Tensor,
        page_RP: Tensor,
        page_tokens: int,
        length_R: Tensor,
        latent_width: int,
        scale: float,
    ) -> Tensor:
        q_RHD = q_RHD.contiguous()
        check(q_RHD, "q", torch.bfloat16, 3)
        num_rows, num_heads, width = q_RHD.shape
        assert num_heads <= HEADS_MAX, f"{num_heads} heads, at most {HEADS_MAX}"
        assert width == cache_CD.shape[1], f"queries of {width}, latents of {cache_CD.shape[1]}"
        page_RP, length_R = page_RP.contiguous(), length_R.contiguous()
        out_RHL = torch.empty(num_rows, num_heads, latent_width, dtype=torch.bfloat16)
        args = Decode(
            q=q_RHD.data_ptr(),
            num_rows=num_rows,
            num_heads=num_heads,
            q_row_stride=num_heads * width,
            cache=cache_of(cache_CD, page_tokens),
            pages=check(page_RP, "pages", torch.int64, 2).data_ptr(),
            page_stride=page_RP.shape[1],
            length=check(length_R, "length", torch.int64, 1).data_ptr(),
            latent_width=latent_width,
            scale=scale,
            out=out_RHL.data_ptr(),
        )
        self.call("mla_decode", ctypes.byref(args))
        return out_RHL

    def mla_prefill(
        self,
        q_THD: Tensor,
        cache_CD: Tensor,
        page_P: Tensor,
        page_tokens: int,
        start: int,
        keys: PackedKeys,
        w_uv: PackedLinear,
        scale: float,
    ) -> Tensor:
        w_uk = keys.decompressing
        check(q_THD, "q", torch.bfloat16, 3)
        num_rows, num_heads, width = q_THD.shape
        assert num_heads == w_uk.num_slots == w_uv.num_slots, f"{num_heads} heads, not {w_uk.num_slots}"
        nope, latent = w_uk.num_outputs, w_uk.num_inputs
        assert width - nope == cache_CD.shape[1] - latent, "rotary widths of q and cache differ"
        page_P = page_P.contiguous()
        out_THV = torch.empty(num_rows, num_heads, w_uv.num_outputs, dtype=torch.bfloat16)
        if num_rows == 0:
            return out_THV
        args = Prefill(
            q=q_THD.data_ptr(),
            num_rows=num_rows,
            num_heads=num_heads,
            nope=nope,
            rope=width - nope,
            q_row_stride=q_THD.stride(0),
            q_head_stride=q_THD.stride(1),
            cache=cache_of(cache_CD, page_tokens),
            pages=check(page_P, "pages", torch.int64, 1).data_ptr(),
            start=start,
            w_uk=w_uk.packed.pointer,
            w_uv=w_uv.packed.pointer,
            scale=scale,
            out=out_THV.data_ptr(),
        )
        self.call("mla_prefill", ctypes.byref(args))
        return out_THV

    def latent_write_(self, cache_CD: Tensor, place_T: Tensor, latent_TL: Tensor, key_TR: Tensor) -> None:
        check(latent_TL, "latent", torch.bfloat16, 2)
        check(key_TR, "key", torch.bfloat16, 2)
        assert cache_CD.is_contiguous(), "the cache is contiguous"
        assert cache_CD.dtype == torch.bfloat16, f"a cache of {cache_CD.dtype}"
        assert latent_TL.shape[1] + key_TR.shape[1] == cache_CD.shape[1], "latent and key fill a place"
        self.call(
            "latent_write",
            cache_CD.data_ptr(),
            cache_CD.shape[1],
            place_T.contiguous().data_ptr(),
            place_T.shape[0],
            latent_TL.data_ptr(),
            latent_TL.stride(0),
            latent_TL.shape[1],
            key_TR.data_ptr(),
            key_TR.stride(0),
        )
