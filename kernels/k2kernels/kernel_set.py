"""The kernels that one rank uses: a frozen table of callables, swappable one by one.

    dataclasses.replace(kernels, mla_decode=another)        same contract, other instructions

A few callables do several steps at once (`whole_*`): a set may have them, with the bits of its own single
steps; None is the composition below, which defines what they give.

Two precisions, chosen by the dtype of the residual stream:

    bfloat16   what is served: linears W8A8 where the checkpoint is FP8, cache and expert outputs bfloat16
    float32    nothing but the weights is quantised: for comparing with other implementations

A callable's contract is the docstring of the file that is named like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

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
from k2kernels.act_quant import QuantisedRows
from k2kernels.fp8_gemm import StoredWeight
from k2kernels.whole import WholeAttention, WholeLayers, WholeMoe

# Weights as a set's own `prepare_*` laid them out: dataclasses, tuples and tensors into which nobody else
# looks, but for `block`, of the scales that activations need (None: no scales).
Prepared: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one MoE layer on one rank, by slot; a rank may hold none."""

    gate_up: Prepared
    down: Prepared


@dataclass(frozen=True, kw_only=True)
class KernelSet:
    """See the module. `dtype`: of the residual stream; `return_dtype`: of experts' outputs going home."""

    name: str
    versions: tuple[str, ...]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    return_dtype: torch.dtype

    prepare_linear: Callable[[Sequence[StoredWeight]], Prepared]
    prepare_plain: Callable[[Tensor], Prepared]  # unquantised: the head
    prepare_keys: Callable[
        [Sequence[StoredWeight]], Prepared
    ]  # kv_b's (`absorb.heads_of`), for absorb and mla_prefill
    prepare_values: Callable[[Sequence[StoredWeight]], Prepared]  # likewise
    prepare_grouped: Callable[[Sequence[Sequence[StoredWeight]], int], Prepared]
    act_quant: Callable[[Tensor, int], QuantisedRows]
    fp8_gemm: Callable[[Tensor | QuantisedRows, Prepared, torch.dtype], Tensor]
    grouped_gemm: Callable[[Tensor | QuantisedRows, Tensor, Prepared, torch.dtype], Tensor]
    linear_bf16: Callable[[Tensor, Prepared, torch.dtype], Tensor]
    router_logits: Callable[[Tensor, Tensor], Tensor]
    router_topk: Callable[[Tensor, Tensor, router_topk.Rule], tuple[Tensor, Tensor]]
    weighted_sum: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    absorb: Callable[[Tensor, Prepared], Tensor]
    mla_decode: Callable[[Tensor, Tensor, Tensor, int, Tensor, int, float], Tensor]
    mla_prefill: Callable[[Tensor, Tensor, Tensor, int, int, Prepared, Prepared, float], Tensor]
    latent_write_: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    rmsnorm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_quant: Callable[[Tensor, int], QuantisedRows]
    pack: Callable[[Tensor, int | None], Tensor]
    unpack: Callable[[Tensor, int, int | None], Tensor | QuantisedRows]

    # Whether what was prepared is what `prepare_grouped` makes of these slots, told without laying them out.
    holds_grouped: Callable[[Prepared, Sequence[Sequence[StoredWeight]]], bool] | None = None
    asks_device: bool = True  # some kernel reads numbers of its rows on the host, so no graph can hold it
    whole_linear: Callable[[Tensor, Prepared, torch.dtype], Tensor] | None = None
    whole_mlp: Callable[[Tensor, Prepared, Prepared, torch.dtype], Tensor] | None = None
    whole_experts: (
        Callable[[Tensor | QuantisedRows, Tensor, Tensor, Prepared, Prepared, torch.dtype], Tensor] | None
    ) = None
    # Half layers and layers (`whole`): what `k2dist.model` composes, where nothing travels in between.
    whole_attention: WholeAttention | None = None
    whole_moe: WholeMoe | None = None
    whole_layers: WholeLayers | None = None

    @classmethod
    def reference(cls, dtype: torch.dtype = torch.bfloat16) -> KernelSet:
        """Plain torch, row-invariant on one machine type: the twin that every other set is tested against."""
        assert dtype in (torch.bfloat16, torch.float32), (
            f"a residual stream is bfloat16 or float32, not {dtype}"
        )
        return cls(
            name="reference",
            versions=(
                f"torch {torch.__version__}",
                torch.backends.cpu.get_cpu_capability(),
                f"{torch.get_num_threads()} threads",  # a library may share one sum among them
            ),
            dtype=dtype,
            cache_dtype=dtype,
            return_dtype=dtype,
            prepare_linear=fp8_gemm.prepare,
            prepare_plain=linear_bf16.prepare,
            prepare_keys=absorb.prepare_keys,
            prepare_values=absorb.prepare_values,
            prepare_grouped=grouped_gemm.prepare_grouped,
            act_quant=act_quant.reference,
            fp8_gemm=fp8_gemm.reference,
            grouped_gemm=grouped_gemm.reference,
            linear_bf16=linear_bf16.reference,
            router_logits=router_logits.reference,
            router_topk=router_topk.reference,
            weighted_sum=weighted_sum.reference,
            absorb=absorb.reference,
            mla_decode=mla_decode.reference,
            mla_prefill=mla_prefill.reference,
            latent_write_=latent_write.reference_,
            rmsnorm=rmsnorm.reference,
            rope=rope.reference,
            swiglu=swiglu.reference,
            swiglu_quant=swiglu_quant.reference,
            pack=wire.pack,
            unpack=wire.unpack,
        )

    @classmethod
    def triton(cls, dtype: torch.dtype = torch.bfloat16) -> KernelSet:
        """Triton kernels for one CUDA device; see `triton_set`."""
        from k2kernels.triton_set import triton_set  # it imports this file

        return triton_set(dtype)

    @classmethod
    def native(cls, isa: str | None = None, num_threads: int | None = None) -> KernelSet:
        """C++ for this machine's CPU, in bfloat16. NoNativeKernelsError where there are none.

        `isa`: one of `k2kernels.native.load().isas`; None: the best. `num_threads`: of each call; None: as
        many as torch uses at that moment. Neither threads nor anything but the ISA moves a bit.
        """
        from k2kernels.native_set import native_set  # it imports this file

        return native_set(isa, num_threads)

    def fingerprint(self) -> str:
        """Ranks whose fingerprints are equal give equal bits at equal tp."""
        return " | ".join((self.name, *self.versions, str(self.dtype), str(self.cache_dtype)))

    @property
    def quantises_activations(self) -> bool:
        return self.dtype == torch.bfloat16

    def linear(self, x_TK: Tensor, w: Prepared, out_dtype: torch.dtype | None = None) -> Tensor:
        """y = x w^T in this set's arithmetic; `out_dtype`: of the residual stream unless said."""
        if self.whole_linear is not None:
            return self.whole_linear(x_TK, w, out_dtype or self.dtype)
        return self.fp8_gemm(self._quantised(x_TK, w.block), w, out_dtype or self.dtype)

    def mlp(
        self, x_TD: Tensor, gate_up: Prepared, down: Prepared, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """down(silu(gate x) * (up x))."""
        if self.whole_mlp is not None:
            return self.whole_mlp(x_TD, gate_up, down, out_dtype or self.dtype)
        middle = self._gated(self.linear(x_TD, gate_up), down.block)
        return self.fp8_gemm(middle, down, out_dtype or self.dtype)

    def wire_pack(self, x_TD: Tensor, block: int | None) -> Tensor:
        """Rows for `Exchange.dispatch`; `block`: of the experts' scales, None if they have none."""
        return self.pack(x_TD, self._act_block(block))

    def wire_unpack(self, row_NW: Tensor, width: int, block: int | None) -> Tensor | QuantisedRows:
        """The rows, `width` wide, as experts take them."""
        return self.unpack(row_NW, width, self._act_block(block))

    def experts(self, x: Tensor | QuantisedRows, row_M: Tensor, counts_e: Tensor, w: Experts) -> Tensor:
        """Each pair's expert on its row of `x`: [M, D] in `return_dtype`. Pairs are sorted by slot.

        As `grouped_gemm`: `counts_e` may sum to less than M, and outputs from there on mean nothing. What
        `row_M` holds there are rows of `x`.
        """
        if self.whole_experts is not None:
            return self.whole_experts(x, row_M, counts_e, w.gate_up, w.down, self.return_dtype)
        h_MG = self.grouped_gemm(x[row_M], counts_e, w.gate_up, self.dtype)
        middle = self._gated(h_MG, w.down.block)
        return self.grouped_gemm(middle, counts_e, w.down, self.return_dtype)

    def _act_block(self, block: int | None) -> int | None:
        return block if self.quantises_activations else None

    def _gated(self, h_TG: Tensor, block: int | None) -> Tensor | QuantisedRows:
        """SwiGLU's middle, as a linear with scales of `block` takes it."""
        act_block = self._act_block(block)
        return self.swiglu(h_TG) if act_block is None else self.swiglu_quant(h_TG, act_block)

    def _quantised(self, x_TK: Tensor, block: int | None) -> Tensor | QuantisedRows:
        """Activations as a linear with scales of `block` takes them."""
        act_block = self._act_block(block)
        return x_TK if act_block is None else self.act_quant(x_TK, act_block)
