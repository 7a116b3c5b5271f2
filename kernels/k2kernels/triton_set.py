"""The Triton kernels as a `KernelSet`: what a CUDA device serves with.

Weights stay as the checkpoint holds them (e4m3 with float32 scales, bfloat16 without). Hopper's tensor cores
are what the tiles were chosen for; Ada and Blackwell take the same kernels. Before compute capability 8.9
there is no e4m3, so there only models without FP8 run.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch

from k2kernels import (
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
    wire,
)
from k2kernels.kernel_set import KernelSet


def triton_set(dtype: torch.dtype = torch.bfloat16) -> KernelSet:
    """The complete table. Imports Triton; on a machine without a device it runs interpreted, for tests."""
    assert dtype in (torch.bfloat16, torch.float32), f"a residual stream is bfloat16 or float32, not {dtype}"
    return KernelSet(
        name="triton",
        versions=(f"torch {torch.__version__}", f"triton {import_module('triton').__version__}", _device()),
        dtype=dtype,
        cache_dtype=dtype,
        return_dtype=dtype,
        prepare_linear=fp8_gemm.prepare_stored,
        prepare_plain=linear_bf16.prepare_stored,
        prepare_keys=partial(absorb.prepare_keys, dtype=dtype),
        prepare_values=partial(absorb.prepare_values, dtype=dtype),
        prepare_grouped=grouped_gemm.prepare_stacked,
        act_quant=act_quant.launch,
        fp8_gemm=fp8_gemm.launch,
        grouped_gemm=grouped_gemm.launch,
        linear_bf16=linear_bf16.launch,
        router_logits=router_logits.launch,
        router_topk=router_topk.launch,
        weighted_sum=weighted_sum.launch,
        absorb=absorb.launch,
        mla_decode=mla_decode.launch,
        mla_prefill=mla_prefill.launch,
        latent_write_=latent_write.launch_,
        rmsnorm=rmsnorm.launch,
        rope=rope.launch,
        swiglu=swiglu.launch,
        swiglu_quant=swiglu_quant.launch,
        pack=wire.pack_on_device,
        unpack=wire.unpack_on_device,
        asks_device=False,
    )


def _device() -> str:
    """The architecture that the kernels are compiled for: its instructions decide the bits."""
    if not torch.cuda.is_available():
        return "interpreted"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}"
