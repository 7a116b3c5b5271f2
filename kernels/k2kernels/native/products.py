"""Products with packed weights, and the activations that go into them. Contracts: the files named like them.

Only bfloat16 streams. Results come in fresh tensors; inputs may be strided where a row is contiguous.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels import wire
from k2kernels.act_quant import QuantisedRows
from k2kernels.native.arguments import OUT_KIND, check, counts_of, rows_of
from k2kernels.native.caller import Caller
from k2kernels.native.layouts import PackedKeys
from k2kernels.native.packed import PackedLinear


@dataclass(frozen=True, slots=True)
class Products:
    call: Caller

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
        self.call(
            "linear",
            w.packed.pointer,
            1,
            ctypes.byref(count),
            rows,
            y_TN.data_ptr(),
            OUT_KIND[out_dtype],
            w.num_outputs,
        )
        return y_TN

    def fp8_gemm(self, x: Tensor | QuantisedRows, w: PackedLinear, out_dtype: torch.dtype) -> Tensor:
        assert isinstance(x, QuantisedRows) or w.block is None, "native linears with float8 weights are W8A8"
        return self.linear(x, w, out_dtype)

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
        self.call(
            "linear",
            w.packed.pointer,
            w.num_slots,
            counts_e.data_ptr(),
            rows,
            y_MN.data_ptr(),
            OUT_KIND[out_dtype],
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
        self.call(
            "heads",
            w.packed.pointer,
            x_THK.data_ptr(),
            num_tokens,
            num_heads,
            x_THK.stride(0),
            x_THK.stride(1),
            y_THN.data_ptr(),
            y_THN.stride(0),
            y_THN.stride(1),
        )
        return y_THN

    def _act_quant(self, x_TK: Tensor, block: int, q_TK: Tensor, scale_Tk: Tensor) -> None:
        self.call(
            "act_quant",
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
        self.call(
            "mlp",
            gate_up.packed.pointer,
            down.packed.pointer,
            gate_up.num_slots,
            counts_e.data_ptr(),
            rows,
            y_MD.data_ptr(),
            OUT_KIND[out_dtype],
        )
        return y_MD
