"""Every op of the set as the native library computes it, for one ISA. Contracts: the files named like them.

Only bfloat16 streams. Results come in fresh tensors; inputs may be strided where a row is contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels import wire
from k2kernels.act_quant import QuantisedRows
from k2kernels.fp8_gemm import StoredWeight
from k2kernels.native.arguments import cache_of, check, counts_of, rows_of
from k2kernels.native.library import OUT_BF16, OUT_F32, Decode, Isa, Prefill, TopkRule
from k2kernels.native.packed import PackedLinear, pack_slots
from k2kernels.router_topk import Rule

_OUT = {torch.bfloat16: OUT_BF16, torch.float32: OUT_F32}
_HEADS_MAX = 256


@dataclass(frozen=True, slots=True)
class PackedKeys:
    """kv_b's key part both ways: queries into the latent space, latents to keys."""

    absorbing: PackedLinear
    decompressing: PackedLinear


@dataclass(frozen=True, slots=True)
class NativeOps:
    """See the module. `num_threads`: of each call; None: as many as torch uses at that moment."""

    isa: Isa
    num_threads: int | None = None

    # -- layouts ---------------------------------------------------------------------------------------

    def prepare_linear(self, parts: Sequence[StoredWeight]) -> PackedLinear:
        return pack_slots([parts], sum(len(part.w_NK) for part in parts), self._threads)

    def prepare_plain(self, w_NK: Tensor) -> PackedLinear:
        return pack_slots([[StoredWeight(w_NK)]], len(w_NK), self._threads)

    def prepare_grouped(self, slots: Sequence[Sequence[StoredWeight]], num_outputs: int) -> PackedLinear:
        return pack_slots(slots, num_outputs, self._threads)

    def prepare_keys(self, w_HNL: Tensor) -> PackedKeys:
        return PackedKeys(self.prepare_heads(w_HNL), self.prepare_heads(w_HNL.transpose(1, 2)))

    def prepare_heads(self, w_HKN: Tensor) -> PackedLinear:
        """For `absorb`: a slot per head, whose outputs are w's last axis."""
        return pack_slots([[StoredWeight(w_KN.T)] for w_KN in w_HKN], w_HKN.shape[2], self._threads)

    # -- products --------------------------------------------------------------------------------------

    def act_quant(self, x_TK: Tensor, block: int) -> QuantisedRows:
        check(x_TK, "x", torch.bfloat16, 2)
        num_tokens, width = x_TK.shape
        q_TK = torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn)
        scale_Tk = torch.empty(num_tokens, -(-width // block))
        self._act_quant(x_TK, block, q_TK, scale_Tk)
        return QuantisedRows(q_TK, scale_Tk, block)

    def pack(self, x_TD: Tensor, block: int | None) -> Tensor:
        if block is None:
            return x_TD
        check(x_TD, "x", torch.bfloat16, 2)
        num_tokens, width = x_TD.shape
        row_TW = torch.empty(num_tokens, width + 4 * -(-width // block), dtype=torch.uint8)
        self._act_quant(x_TD, block, row_TW, row_TW[:, width:])
        return row_TW

    def unpack(self, row_TW: Tensor, width: int, block: int | None) -> Tensor | QuantisedRows:
        """Views of the rows, where their scales are aligned."""
        if block is None or width % 4 != 0 or not row_TW.is_contiguous():
            return wire.unpack(row_TW, width, block)
        expected = width + 4 * -(-width // block)
        assert row_TW.shape[1] == expected, f"{row_TW.shape[1]} bytes in a row, expected {expected}"
        q_TD, scale_TB = row_TW[:, :width], row_TW[:, width:]
        return QuantisedRows(q_TD.view(torch.float8_e4m3fn), scale_TB.view(torch.float32), block)

    def linear(self, x: Tensor | QuantisedRows, w: PackedLinear, out_dtype: torch.dtype) -> Tensor:
        """As fp8_gemm; bfloat16 activations are quantised on the way where the weights are float8."""
        rows, num_rows = rows_of(x, w, None)
        y_TN = torch.empty(num_rows, w.num_outputs, dtype=out_dtype)
        count = ctypes.c_int64(num_rows)
        self.isa.call["linear"](
            self._threads,
            w.packed.pointer,
            1,
            ctypes.byref(count),
            rows,
            y_TN.data_ptr(),
            _OUT[out_dtype],
            w.num_outputs,
        )
        return y_TN

    def fp8_gemm(self, x: Tensor | QuantisedRows, w: PackedLinear, out_dtype: torch.dtype) -> Tensor:
        assert isinstance(x, QuantisedRows) or w.block is None, "native linears with float8 weights are W8A8"
        return self.linear(x, w, out_dtype)

    def linear_bf16(self, x_TK: Tensor, w: PackedLinear, out_dtype: torch.dtype) -> Tensor:
        return self.linear(x_TK, w, out_dtype)

    def grouped_gemm(
        self, x: Tensor | QuantisedRows, counts_e: Tensor, w: PackedLinear, out_dtype: torch.dtype
    ) -> Tensor:
        if w.num_slots == 0:  # a rank without slots: no row is its own
            num_rows = len(x.q_TK if isinstance(x, QuantisedRows) else x)
            return torch.empty(num_rows, w.num_outputs, dtype=out_dtype)
        assert isinstance(x, QuantisedRows) or w.block is None, "native linears with float8 weights are W8A8"
        rows, num_rows = rows_of(x, w, None)
        counts_e = counts_of(counts_e, w, num_rows)
        y_MN = torch.empty(num_rows, w.num_outputs, dtype=out_dtype)
        self.isa.call["linear"](
            self._threads,
            w.packed.pointer,
            w.num_slots,
            counts_e.data_ptr(),
            rows,
            y_MN.data_ptr(),
            _OUT[out_dtype],
            w.num_outputs,
        )
        return y_MN

    def mlp(self, x_TD: Tensor, gate_up: PackedLinear, down: PackedLinear, out_dtype: torch.dtype) -> Tensor:
        return self._mlp(x_TD, None, torch.tensor([x_TD.shape[0]]), gate_up, down, out_dtype)

    def experts(
        self,
        x: Tensor | QuantisedRows,
        row_M: Tensor,
        counts_e: Tensor,
        gate_up: PackedLinear,
        down: PackedLinear,
        out_dtype: torch.dtype,
    ) -> Tensor:
        if gate_up.num_slots == 0:
            return torch.empty(len(row_M), down.num_outputs, dtype=out_dtype)
        return self._mlp(x, row_M, counts_e, gate_up, down, out_dtype)

    def absorb(self, x_THK: Tensor, w: PackedLinear | PackedKeys) -> Tensor:
        if isinstance(w, PackedKeys):
            w = w.absorbing
        check(x_THK, "x", torch.bfloat16, 3)
        num_tokens, num_heads, width = x_THK.shape
        assert (num_heads, width) == (w.num_slots, w.num_inputs), (
            f"x is [T, {num_heads}, {width}], w of {w.num_slots} heads with {w.num_inputs} inputs"
        )
        y_THN = torch.empty(num_tokens, num_heads, w.num_outputs, dtype=torch.bfloat16)
        self.isa.call["heads"](
            self._threads,
            w.packed.pointer,
            x_THK.data_ptr(),
            num_tokens,
            num_heads,
            x_THK.stride(0),
            x_THK.stride(1),
            y_THN.data_ptr(),
        )
        return y_THN

    # -- attention -------------------------------------------------------------------------------------

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
        assert num_heads <= _HEADS_MAX, f"{num_heads} heads, at most {_HEADS_MAX}"
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
        self.isa.call["mla_decode"](self._threads, ctypes.byref(args))
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
        self.isa.call["mla_prefill"](self._threads, ctypes.byref(args))
        return out_THV

    def latent_write_(self, cache_CD: Tensor, place_T: Tensor, latent_TL: Tensor, key_TR: Tensor) -> None:
        check(latent_TL, "latent", torch.bfloat16, 2)
        check(key_TR, "key", torch.bfloat16, 2)
        assert cache_CD.is_contiguous(), "the cache is contiguous"
        assert cache_CD.dtype == torch.bfloat16, f"a cache of {cache_CD.dtype}"
        assert latent_TL.shape[1] + key_TR.shape[1] == cache_CD.shape[1], "latent and key fill a place"
        self.isa.call["latent_write"](
            self._threads,
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

    # -- row by row ------------------------------------------------------------------------------------

    def rmsnorm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        check(x_TD, "x", torch.bfloat16, 2)
        check(weight_D, "weight", torch.bfloat16, 1)
        num_tokens, width = x_TD.shape
        y_TD = torch.empty(num_tokens, width, dtype=torch.bfloat16)
        self.isa.call["rmsnorm"](
            self._threads,
            x_TD.data_ptr(),
            weight_D.data_ptr(),
            num_tokens,
            width,
            x_TD.stride(0),
            eps,
            y_TD.data_ptr(),
            width,
        )
        return y_TD

    def rope(self, x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        check(x_THR, "x", torch.bfloat16, 3)
        num_tokens, num_heads, width = x_THR.shape
        cos_TF, sin_TF = cos_TF.contiguous(), sin_TF.contiguous()
        y_THR = torch.empty(num_tokens, num_heads, width, dtype=torch.bfloat16)
        self.isa.call["rope"](
            self._threads,
            x_THR.data_ptr(),
            num_tokens,
            num_heads,
            width // 2,
            x_THR.stride(0),
            x_THR.stride(1),
            check(cos_TF, "cos", torch.float32, 2).data_ptr(),
            check(sin_TF, "sin", torch.float32, 2).data_ptr(),
            y_THR.data_ptr(),
            num_heads * width,
            width,
        )
        return y_THR

    def swiglu(self, h_TG: Tensor) -> Tensor:
        h_TG = h_TG.contiguous()
        check(h_TG, "h", torch.bfloat16, 2)
        num_tokens, width = h_TG.shape[0], h_TG.shape[1] // 2
        y_TF = torch.empty(num_tokens, width, dtype=torch.bfloat16)
        self.isa.call["swiglu"](self._threads, h_TG.data_ptr(), num_tokens, width, y_TF.data_ptr())
        return y_TF

    def swiglu_quant(self, h_TG: Tensor, block: int) -> QuantisedRows:
        return self.act_quant(self.swiglu(h_TG), block)

    def weighted_sum(
        self, out_TKD: Tensor, weight_TK: Tensor, shared_TD: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        out_TKD, weight_TK, shared_TD = out_TKD.contiguous(), weight_TK.contiguous(), shared_TD.contiguous()
        num_tokens, top_k, width = out_TKD.shape
        y_TD = torch.empty(num_tokens, width, dtype=out_dtype)
        self.isa.call["weighted_sum"](
            self._threads,
            check(out_TKD, "out", torch.bfloat16, 3).data_ptr(),
            check(weight_TK, "weight", torch.float32, 2).data_ptr(),
            check(shared_TD, "shared", torch.float32, 2).data_ptr(),
            num_tokens,
            top_k,
            width,
            y_TD.data_ptr(),
            _OUT[out_dtype],
        )
        return y_TD

    # -- router ----------------------------------------------------------------------------------------

    def router_logits(self, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        check(x_TD, "x", torch.bfloat16, 2)
        check(w_ED, "w", torch.float32, 2)
        assert w_ED.is_contiguous(), "the router's weights are contiguous"
        y_TE = torch.empty(x_TD.shape[0], w_ED.shape[0])
        self.isa.call["router_logits"](
            self._threads,
            x_TD.data_ptr(),
            x_TD.shape[0],
            x_TD.shape[1],
            x_TD.stride(0),
            w_ED.data_ptr(),
            w_ED.shape[0],
            y_TE.data_ptr(),
        )
        return y_TE

    def router_topk(self, logit_TE: Tensor, bias_E: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        logit_TE = logit_TE.contiguous()
        num_tokens, num_experts = logit_TE.shape
        expert_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.int64)
        weight_TK = torch.empty(num_tokens, rule.top_k)
        how = TopkRule(rule.top_k, rule.num_groups, rule.top_k_groups, rule.normalises, rule.scale)
        self.isa.call["router_topk"](
            self._threads,
            check(logit_TE, "logit", torch.float32, 2).data_ptr(),
            check(bias_E, "bias", torch.float32, 1).data_ptr(),
            num_tokens,
            num_experts,
            ctypes.byref(how),
            expert_TK.data_ptr(),
            weight_TK.data_ptr(),
        )
        return expert_TK, weight_TK

    # -- what they share -------------------------------------------------------------------------------

    @property
    def _threads(self) -> int:
        return torch.get_num_threads() if self.num_threads is None else self.num_threads

    def _act_quant(self, x_TK: Tensor, block: int, q_TK: Tensor, scale_Tk: Tensor) -> None:
        self.isa.call["act_quant"](
            self._threads,
            x_TK.data_ptr(),
            x_TK.shape[0],
            x_TK.shape[1],
            x_TK.stride(0),
            block,
            q_TK.data_ptr(),
            q_TK.stride(0),
            scale_Tk.data_ptr(),
            scale_Tk.stride(0) * scale_Tk.element_size(),
        )

    def _mlp(
        self,
        x: Tensor | QuantisedRows,
        row_M: Tensor | None,
        counts_e: Tensor,
        gate_up: PackedLinear,
        down: PackedLinear,
        out_dtype: torch.dtype,
    ) -> Tensor:
        rows, num_rows = rows_of(x, gate_up, row_M)
        counts_e = counts_of(counts_e, gate_up, num_rows)
        y_MD = torch.empty(num_rows, down.num_outputs, dtype=out_dtype)
        if num_rows == 0:
            return y_MD
        assert gate_up.num_outputs == 2 * down.num_inputs, "gate, up and down have one inner width"
        self.isa.call["mlp"](
            self._threads,
            gate_up.packed.pointer,
            down.packed.pointer,
            gate_up.num_slots,
            counts_e.data_ptr(),
            rows,
            y_MD.data_ptr(),
            _OUT[out_dtype],
        )
        return y_MD
