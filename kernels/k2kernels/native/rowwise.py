"""What is done row by row between the products, and the router. Contracts: the files named like them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.native.arguments import OUT_KIND, check, rule_of
from k2kernels.native.caller import Caller
from k2kernels.router_topk import Rule


@dataclass(frozen=True, slots=True)
class Rowwise:
    call: Caller

    def rmsnorm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        check(x_TD, "x", torch.bfloat16, 2)
        check(weight_D, "weight", torch.bfloat16, 1)
        num_tokens, width = x_TD.shape
        y_TD = torch.empty(num_tokens, width, dtype=torch.bfloat16)
        self.call(
            "rmsnorm",
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
        self.call(
            "rope",
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
        self.call("swiglu", h_TG.data_ptr(), num_tokens, width, y_TF.data_ptr())
        return y_TF

    def weighted_sum(
        self, out_TKD: Tensor, weight_TK: Tensor, shared_TD: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        out_TKD, weight_TK, shared_TD = out_TKD.contiguous(), weight_TK.contiguous(), shared_TD.contiguous()
        num_tokens, top_k, width = out_TKD.shape
        y_TD = torch.empty(num_tokens, width, dtype=out_dtype)
        self.call(
            "weighted_sum",
            check(out_TKD, "out", torch.bfloat16, 3).data_ptr(),
            check(weight_TK, "weight", torch.float32, 2).data_ptr(),
            check(shared_TD, "shared", torch.float32, 2).data_ptr(),
            num_tokens,
            top_k,
            width,
            y_TD.data_ptr(),
            OUT_KIND[out_dtype],
        )
        return y_TD

    def router_logits(self, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        check(x_TD, "x", torch.bfloat16, 2)
        check(w_ED, "w", torch.float32, 2)
        assert w_ED.is_contiguous(), "the router's weights are contiguous"
        y_TE = torch.empty(x_TD.shape[0], w_ED.shape[0])
        self.call(
            "router_logits",
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
        how = rule_of(rule)
        self.call(
            "router_topk",
            check(logit_TE, "logit", torch.float32, 2).data_ptr(),
            check(bias_E, "bias", torch.float32, 1).data_ptr(),
            num_tokens,
            num_experts,
            ctypes.byref(how),
            expert_TK.data_ptr(),
            weight_TK.data_ptr(),
        )
        return expert_TK, weight_TK
