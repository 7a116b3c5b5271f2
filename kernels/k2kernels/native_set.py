"""The native kernels as a set: C++ for this machine's CPU, for bfloat16 streams."""

from __future__ import annotations

import torch

from k2kernels.kernel_set import KernelSet
from k2kernels.native.attention import Attention
from k2kernels.native.caller import Caller
from k2kernels.native.layouts import Layouts
from k2kernels.native.library import load
from k2kernels.native.products import Products
from k2kernels.native.rowwise import Rowwise
from k2kernels.native.whole import Whole


def native_set(isa: str | None = None, num_threads: int | None = None) -> KernelSet:
    """The complete table. NoNativeKernelsError where there are none."""
    library = load()
    call = Caller(library.best if isa is None else library.isas[isa], num_threads)
    layouts, products, attention = Layouts(call), Products(call), Attention(call)
    rowwise, whole = Rowwise(call), Whole(call)
    return KernelSet(
        name="native",
        versions=(call.isa.name, library.build),
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16,
        return_dtype=torch.bfloat16,
        prepare_linear=layouts.prepare_linear,
        prepare_plain=layouts.prepare_plain,
        prepare_keys=layouts.prepare_keys,
        prepare_values=layouts.prepare_values,
        prepare_grouped=layouts.prepare_grouped,
        holds_grouped=layouts.holds_grouped,
        act_quant=products.act_quant,
        fp8_gemm=products.fp8_gemm,
        grouped_gemm=products.grouped_gemm,
        linear_bf16=products.linear,
        router_logits=rowwise.router_logits,
        router_topk=rowwise.router_topk,
        weighted_sum=rowwise.weighted_sum,
        absorb=products.absorb,
        mla_decode=attention.mla_decode,
        mla_prefill=attention.mla_prefill,
        latent_write_=attention.latent_write_,
        rmsnorm=rowwise.rmsnorm,
        rope=rowwise.rope,
        swiglu=rowwise.swiglu,
        swiglu_quant=lambda h_TG, block: products.act_quant(rowwise.swiglu(h_TG), block),
        pack=products.pack,
        unpack=products.unpack,
        whole_linear=products.linear,
        whole_mlp=products.mlp,
        whole_experts=products.experts,
        whole_attention=whole.attention,
        whole_moe=whole.moe,
        whole_layers=whole.layers,
    )
