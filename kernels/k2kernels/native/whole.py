"""Half layers in one call (`k2kernels.whole`): the same functions of the library, called from C."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.native.arguments import check, rule_of
from k2kernels.native.attention import HEADS_MAX
from k2kernels.native.caller import Caller
from k2kernels.native.library import AttentionArgs, GeneratedArgs, MoeArgs
from k2kernels.router_topk import Rule
from k2kernels.whole import AttentionWeights, GeneratedRows, MlpWeights, RouterWeights


@dataclass(frozen=True, slots=True)
class Whole:
    call: Caller

    def attention(
        self,
        x_TD: Tensor,
        weights: AttentionWeights,
        rows: GeneratedRows,
        cache_CD: Tensor,
        cos_PF: Tensor,
        sin_PF: Tensor,
        eps: float,
        scale: float,
    ) -> Tensor:
        """[T, D] bfloat16; the rows' latents are then in the cache."""
        check(x_TD, "x", torch.bfloat16, 2)
        check(cache_CD, "cache", torch.bfloat16, 2)
        assert cache_CD.is_contiguous(), "the cache is contiguous"
        num_rows, latent = x_TD.shape[0], weights.kv_norm_L.shape[0]
        rope = cache_CD.shape[1] - latent
        y_TD = torch.empty(num_rows, weights.o.num_outputs, dtype=torch.bfloat16)
        w_uk, w_uv, page_TP = weights.w_uk_hNL.absorbing, weights.w_uv_hLV, rows.page_TP.contiguous()
        assert w_uv.num_slots <= HEADS_MAX, f"{w_uv.num_slots} heads, at most {HEADS_MAX}"
        assert x_TD.shape[1] == weights.qkv_a.num_inputs, f"x has {x_TD.shape[1]} columns"
        assert check(cos_PF, "cos", torch.float32, 2).shape[1] == rope // 2, "angles are of the rotary width"
        q_rank, heads = check(weights.q_norm_Q, "q_norm", torch.bfloat16, 1).shape[0], w_uv.num_slots
        check(weights.kv_norm_L, "kv_norm", torch.bfloat16, 1)
        assert weights.qkv_a.num_outputs == q_rank + cache_CD.shape[1], "q_a and kv_a fill latent and key"
        assert weights.q_b.num_outputs == heads * (w_uk.num_inputs + rope), "q_b gives each head its query"
        assert w_uk.num_slots == heads, f"kv_b's keys are of {w_uk.num_slots} heads, its values of {heads}"
        assert w_uk.num_outputs == w_uv.num_inputs == latent, "kv_b's latent width is the norm's"
        assert weights.o.num_inputs == heads * w_uv.num_outputs, "o takes each head's values"
        layer = AttentionArgs(
            qkv_a=weights.qkv_a.packed.pointer,
            q_b=weights.q_b.packed.pointer,
            w_uk=w_uk.packed.pointer,
            w_uv=w_uv.packed.pointer,
            o=weights.o.packed.pointer,
            q_norm=weights.q_norm_Q.data_ptr(),
            kv_norm=weights.kv_norm_L.data_ptr(),
            num_heads=heads,
            q_rank=q_rank,
            latent=latent,
            nope=w_uk.num_inputs,
            rope=rope,
            value=w_uv.num_outputs,
            eps=eps,
            scale=scale,
        )
        generated = GeneratedArgs(
            x=x_TD.data_ptr(),
            num_rows=num_rows,
            x_stride=x_TD.stride(0),
            cosine=cos_PF.data_ptr(),
            sine=check(sin_PF, "sin", torch.float32, 2).data_ptr(),
            position=_numbers(rows.position_T, "positions", num_rows),
            place=_numbers(rows.place_T, "places", num_rows),
            length=_numbers(rows.length_T, "lengths", num_rows),
            pages=check(page_TP, "pages", torch.int64, 2).data_ptr(),
            page_stride=page_TP.shape[1],
            page_tokens=rows.page_tokens,
            cache=cache_CD.data_ptr(),
        )
        self.call("attention", layer, generated, y_TD.data_ptr())
        return y_TD

    def moe(
        self,
        x_TD: Tensor,
        router: RouterWeights,
        rule: Rule,
        shared: MlpWeights,
        experts: MlpWeights,
        slot_E: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[T, D] bfloat16, and how many pairs of row and expert each slot computed: int64 [e].

        `slot_E`: int32, the slot of every expert.
        """
        check(x_TD, "x", torch.bfloat16, 2)
        (num_rows, width), num_slots = x_TD.shape, experts.gate_up.num_slots
        assert router.w_ED.is_contiguous(), "the router's weights are contiguous"
        num_experts = check(router.w_ED, "w", torch.float32, 2).shape[0]
        assert width == experts.gate_up.num_inputs == router.w_ED.shape[1], f"x has {width} columns"
        assert width == shared.gate_up.num_inputs == shared.down.num_outputs == experts.down.num_outputs
        assert check(slot_E, "slots", torch.int32, 1).shape[0] == num_experts, "every expert has a slot"
        y_TD = torch.empty(num_rows, width, dtype=torch.bfloat16)
        out_MD = torch.empty(num_rows * rule.top_k, width, dtype=torch.bfloat16)
        counts_e = torch.empty(num_slots, dtype=torch.int64)
        layer = MoeArgs(
            shared_gate_up=shared.gate_up.packed.pointer,
            shared_down=shared.down.packed.pointer,
            gate_up=experts.gate_up.packed.pointer,
            down=experts.down.packed.pointer,
            router=router.w_ED.data_ptr(),
            bias=check(router.bias_E, "bias", torch.float32, 1).data_ptr(),
            slot=slot_E.data_ptr(),
            num_experts=num_experts,
            num_slots=num_slots,
            rule=rule_of(rule),
        )
        self.call(
            "moe",
            layer,
            x_TD.data_ptr(),
            num_rows,
            x_TD.stride(0),
            out_MD.data_ptr(),
            y_TD.data_ptr(),
            counts_e.data_ptr(),
        )
        return y_TD, counts_e


def _numbers(x_T: Tensor, name: str, num_rows: int) -> int:
    """Where `num_rows` int64 lie."""
    assert check(x_T, name, torch.int64, 1).shape[0] == num_rows, f"{x_T.shape[0]} {name} for {num_rows} rows"
    assert x_T.is_contiguous(), f"{name} are contiguous"
    return x_T.data_ptr()
