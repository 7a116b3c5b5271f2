"""Half layers and layers in one call (`k2kernels.whole`): the functions of the library, called from C."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2kernels.native.arguments import check, rule_of
from k2kernels.native.attention import HEADS_MAX
from k2kernels.native.caller import Caller
from k2kernels.native.library import AttentionArgs, GeneratedArgs, LayerArgs, MoeArgs
from k2kernels.router_topk import Rule
from k2kernels.whole import (
    AttentionWeights,
    GeneratedRows,
    Latents,
    LayerWeights,
    MlpWeights,
    Numbers,
    RouterWeights,
    StackWeights,
)


class _Built:
    """The structures of the model used last; checking and filling them takes 0.3 ms of a step of 20.

    A set of kernels serves one rank, whose device thread is the only caller.
    """

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._numbers: tuple[object, ...] = ()
        self._layers: ctypes.Array[LayerArgs] = (LayerArgs * 0)()

    def layers(
        self,
        stack: StackWeights,
        experts: Sequence[MlpWeights],
        latents: Latents,
        numbers: Numbers,
        width: int,
    ) -> ctypes.Array[LayerArgs]:
        """Of these very weights and caches; without slots and counts, which each step brings."""
        of = (stack.layers, experts, latents.layers, latents.rope)
        is_known = len(self._of) == len(of) and all(map(operator.is_, of, self._of))
        if not is_known or self._numbers != (numbers, width):
            self._layers = _layers(stack.layers, experts, latents, numbers, width)
            self._of, self._numbers = of, (numbers, width)
        return self._layers


@dataclass(frozen=True, slots=True)
class Whole:
    call: Caller
    _built: _Built = field(default_factory=_Built)

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
        y_TD = torch.empty(x_TD.shape[0], weights.o.num_outputs, dtype=torch.bfloat16)
        generated = _generated(rows, len(x_TD), cos_PF, sin_PF)
        layer = _attention(weights, x_TD.shape[1], cache_CD, cos_PF, eps, scale)
        self.call(
            "attention",
            layer,
            generated,
            x_TD.data_ptr(),
            x_TD.stride(0),
            cache_CD.data_ptr(),
            y_TD.data_ptr(),
        )
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
        num_rows, width = x_TD.shape
        y_TD = torch.empty(num_rows, width, dtype=torch.bfloat16)
        out_MD = torch.empty(num_rows * rule.top_k, width, dtype=torch.bfloat16)
        counts_e = torch.empty(experts.gate_up.num_slots, dtype=torch.int64)
        layer = _moe(router, rule, shared, experts, width)
        layer.slot = _slots(slot_E, layer.num_experts)
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

    def layers(
        self,
        h_TD: Tensor,
        stack: StackWeights,
        experts: Sequence[MlpWeights],
        slots: Sequence[Tensor],
        rows: GeneratedRows,
        latents: Latents,
        numbers: Numbers,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """[T, D] bfloat16, and each layer's counts, as of `moe`. `h_TD` is used up."""
        check(h_TD, "h", torch.bfloat16, 2)
        assert h_TD.is_contiguous(), "the stream is contiguous"
        num_rows, width = h_TD.shape
        layers = self._built.layers(stack, experts, latents, numbers, width)
        num_slots = [layer.gate_up.num_slots for layer in experts]
        counts = torch.empty(sum(num_slots), dtype=torch.int64).split(num_slots)
        num_dense = len(layers) - len(experts)
        for i, (slot_E, counts_e) in enumerate(zip(slots, counts, strict=True), start=num_dense):
            layers[i].moe.slot = _slots(slot_E, layers[i].moe.num_experts)
            layers[i].counts = counts_e.data_ptr()
        y_TD = torch.empty(num_rows, width, dtype=torch.bfloat16)
        out_MD = torch.empty(num_rows * numbers.rule.top_k, width, dtype=torch.bfloat16)
        self.call(
            "layers",
            layers,
            len(layers),
            _norm(stack.norm_D, "norm", width),
            width,
            numbers.eps,
            _generated(rows, num_rows, latents.rope.cos_PF, latents.rope.sin_PF),
            h_TD.data_ptr(),
            out_MD.data_ptr(),
            y_TD.data_ptr(),
        )
        return y_TD, counts


def _layers(
    layers: Sequence[LayerWeights],
    experts: Sequence[MlpWeights],
    latents: Latents,
    numbers: Numbers,
    width: int,
) -> ctypes.Array[LayerArgs]:
    assert len(latents.layers) == len(layers), f"{len(latents.layers)} caches for {len(layers)} layers"
    made, num_dense = (LayerArgs * len(layers))(), len(layers) - len(experts)
    for i, (layer, cache_CD) in enumerate(zip(layers, latents.layers, strict=True)):
        one = made[i]
        one.attention_norm = _norm(layer.attention_norm_D, "attention_norm", width)
        one.mlp_norm = _norm(layer.mlp_norm_D, "mlp_norm", width)
        one.attention = _attention(
            layer.attention, width, cache_CD, latents.rope.cos_PF, numbers.inner_eps, numbers.scale
        )
        one.cache = cache_CD.data_ptr()
        if i < num_dense:
            gate_up, down = layer.mlp.gate_up, layer.mlp.down
            assert width == gate_up.num_inputs == down.num_outputs, f"the stream has {width} columns"
            one.gate_up, one.down = gate_up.packed.pointer, down.packed.pointer
        else:
            mlp = layer.mlp
            one.moe = _moe(mlp.router, numbers.rule, mlp.shared, experts[i - num_dense], width)
    return made


def _attention(
    weights: AttentionWeights, width: int, cache_CD: Tensor, cos_PF: Tensor, eps: float, scale: float
) -> AttentionArgs:
    """For rows `width` wide."""
    check(cache_CD, "cache", torch.bfloat16, 2)
    assert cache_CD.is_contiguous(), "the cache is contiguous"
    latent = check(weights.kv_norm_L, "kv_norm", torch.bfloat16, 1).shape[0]
    q_rank = check(weights.q_norm_Q, "q_norm", torch.bfloat16, 1).shape[0]
    rope, w_uk, w_uv = cache_CD.shape[1] - latent, weights.w_uk_hNL.absorbing, weights.w_uv_hLV
    heads = w_uv.num_slots
    assert heads <= HEADS_MAX, f"{heads} heads, at most {HEADS_MAX}"
    assert width == weights.qkv_a.num_inputs == weights.o.num_outputs, f"x has {width} columns"
    assert cos_PF.shape[1] == rope // 2, "angles are of the rotary width"
    assert weights.qkv_a.num_outputs == q_rank + cache_CD.shape[1], "q_a and kv_a fill latent and key"
    assert weights.q_b.num_outputs == heads * (w_uk.num_inputs + rope), "q_b gives each head its query"
    assert w_uk.num_slots == heads, f"kv_b's keys are of {w_uk.num_slots} heads, its values of {heads}"
    assert w_uk.num_outputs == w_uv.num_inputs == latent, "kv_b's latent width is the norm's"
    assert weights.o.num_inputs == heads * w_uv.num_outputs, "o takes each head's values"
    return AttentionArgs(
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


def _moe(router: RouterWeights, rule: Rule, shared: MlpWeights, experts: MlpWeights, width: int) -> MoeArgs:
    """For rows `width` wide; without the experts' slots."""
    assert router.w_ED.is_contiguous(), "the router's weights are contiguous"
    num_experts = check(router.w_ED, "w", torch.float32, 2).shape[0]
    assert width == experts.gate_up.num_inputs == router.w_ED.shape[1], f"x has {width} columns"
    assert width == shared.gate_up.num_inputs == shared.down.num_outputs == experts.down.num_outputs
    assert shared.gate_up.block == experts.gate_up.block, "shared expert and experts take rows alike"
    return MoeArgs(
        shared_gate_up=shared.gate_up.packed.pointer,
        shared_down=shared.down.packed.pointer,
        gate_up=experts.gate_up.packed.pointer,
        down=experts.down.packed.pointer,
        router=router.w_ED.data_ptr(),
        bias=check(router.bias_E, "bias", torch.float32, 1).data_ptr(),
        num_experts=num_experts,
        num_slots=experts.gate_up.num_slots,
        rule=rule_of(rule),
    )


def _generated(rows: GeneratedRows, num_rows: int, cos_PF: Tensor, sin_PF: Tensor) -> GeneratedArgs:
    """`rows` must outlive the call."""
    page_TP = check(rows.page_TP, "pages", torch.int64, 2)
    return GeneratedArgs(
        num_rows=num_rows,
        cosine=check(cos_PF, "cos", torch.float32, 2).data_ptr(),
        sine=check(sin_PF, "sin", torch.float32, 2).data_ptr(),
        position=_numbers(rows.position_T, "positions", num_rows),
        place=_numbers(rows.place_T, "places", num_rows),
        length=_numbers(rows.length_T, "lengths", num_rows),
        pages=page_TP.data_ptr(),
        page_stride=page_TP.stride(0),
        page_tokens=rows.page_tokens,
    )


def _slots(slot_E: Tensor, num_experts: int) -> int:
    assert check(slot_E, "slots", torch.int32, 1).shape[0] == num_experts, "every expert has a slot"
    return slot_E.data_ptr()


def _norm(weight_D: Tensor, name: str, width: int) -> int:
    assert check(weight_D, name, torch.bfloat16, 1).shape[0] == width, f"{name} is of {len(weight_D)} columns"
    return weight_D.data_ptr()


def _numbers(x_T: Tensor, name: str, num_rows: int) -> int:
    """Where `num_rows` int64 lie."""
    assert check(x_T, name, torch.int64, 1).shape[0] == num_rows, f"{x_T.shape[0]} {name} for {num_rows} rows"
    assert x_T.is_contiguous(), f"{name} are contiguous"
    return x_T.data_ptr()
