"""Choose each token's experts and their weights (the checkpoint's `noaux_tc` with `sigmoid` scores).

    score = sigmoid(logit)          choice = score + bias
    groups of neighbouring experts: a group counts the sum of its two best choices; the best
    `top_k_groups` groups stay, and of their experts the `top_k` best choices
    weight = score / (sum of the chosen scores + 1e-20) * scale

T tokens (may be 0), E experts, K chosen, g groups. The bias moves the choice and never the weight. Ties go to
the lower expert, and to the lower group. All float32. Result: experts ascending (int64), so that whoever sums
over them has one order; weights in the same order.
Source: DeepSeek-V3 report, arXiv:2412.19437, section 2.1.2; inference/model.py, Gate. Kimi K2 has one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels import portable
from k2kernels.arguments import FLOAT32, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit, next_power_of_2
from k2kernels.rows import sigmoid, tree_sum

sigmoid_tile = portable.sigmoid

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, slots=True)
class Rule:
    """How to choose; see the module. `normalises`: divide by the sum of the chosen scores."""

    top_k: int
    num_groups: int
    top_k_groups: int
    normalises: bool
    scale: float


def reference(logit_TE: Tensor, bias_E: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    score_TE = sigmoid(logit_TE)
    choice_TE = score_TE + bias_E
    if rule.top_k_groups < rule.num_groups:
        choice_TE = choice_TE.masked_fill(~_in_best_groups(choice_TE, rule), -torch.inf)
    order_TE = choice_TE.argsort(dim=-1, descending=True, stable=True)
    expert_TK = order_TE[:, : rule.top_k].sort(dim=-1).values
    weight_TK = score_TE.gather(-1, expert_TK)
    if rule.normalises:
        weight_TK = weight_TK / (tree_sum(weight_TK, -1)[:, None] + 1e-20)
    return expert_TK, weight_TK * rule.scale


def _in_best_groups(choice_TE: Tensor, rule: Rule) -> Tensor:
    """Bool [T, E]: whether the expert's group is one of the best."""
    num_tokens, num_experts = choice_TE.shape
    group_size = num_experts // rule.num_groups
    best_Tg2 = choice_TE.view(num_tokens, rule.num_groups, group_size).sort(dim=-1, descending=True).values
    group_score_Tg = tree_sum(best_Tg2[:, :, :2], -1)
    order_Tg = group_score_Tg.argsort(dim=-1, descending=True, stable=True)
    is_best_Tg = torch.zeros_like(group_score_Tg, dtype=torch.bool)
    is_best_Tg.scatter_(-1, order_Tg[:, : rule.top_k_groups], True)
    return is_best_Tg.repeat_interleave(group_size, dim=-1)


@jit
def _best_groups(
    choice_gS, is_expert_gS, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TILE_G: tl.constexpr
):
    """Which groups stay, bool [TILE_G]: those with the largest sums of two choices; of equals the lower."""
    column_gS = tl.broadcast_to(tl.arange(0, choice_gS.shape[1])[None, :], choice_gS.shape)
    first_g = tl.max(choice_gS, axis=1)
    at_first_gS = (choice_gS == first_g[:, None]) & is_expert_gS
    first_column_g = tl.min(tl.where(at_first_gS, column_gS, choice_gS.shape[1]), axis=1)
    is_rest_gS = is_expert_gS & (column_gS != first_column_g[:, None])
    second_g = tl.max(tl.where(is_rest_gS, choice_gS, float("-inf")), axis=1)
    has_second_g = tl.max(is_rest_gS.to(tl.int32), axis=1) > 0
    g_g = tl.arange(0, TILE_G)
    score_g = tl.where(has_second_g, first_g + second_g, first_g)
    is_left_g = g_g < NUM_GROUPS
    for _ in tl.static_range(TOP_GROUPS):
        key_g = tl.where(is_left_g, score_g, float("-inf"))
        is_best_g = is_left_g & (key_g == tl.max(key_g, axis=0))
        is_left_g = is_left_g & (g_g != tl.min(tl.where(is_best_g, g_g, TILE_G), axis=0))
    return (g_g < NUM_GROUPS) & (is_left_g == 0)


@jit
def _router_topk(
    logit_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    logit_stride,
    scale,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_S: tl.constexpr,
    NORMALISES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g_g, s_S = tl.arange(0, TILE_G), tl.arange(0, TILE_S)
    expert_gS = g_g[:, None] * GROUP_SIZE + s_S[None, :]
    is_expert_gS = (g_g < NUM_GROUPS)[:, None] & (s_S < GROUP_SIZE)[None, :]
    logit_gS = tl.load(logit_ptr + row * logit_stride + expert_gS, mask=is_expert_gS, other=0.0)
    score_gS = sigmoid_tile(logit_gS)
    choice_gS = score_gS + tl.load(bias_ptr + expert_gS, mask=is_expert_gS, other=0.0)
    # NaN is above all else, as in a sort; an index past the last expert must never come out.
    choice_gS = tl.where(choice_gS != choice_gS, float("inf"), choice_gS)
    choice_gS = tl.where(is_expert_gS, choice_gS, float("-inf"))
    is_left_gS = is_expert_gS
    if TOP_GROUPS < NUM_GROUPS:
        is_left_gS = (
            is_left_gS & _best_groups(choice_gS, is_expert_gS, NUM_GROUPS, TOP_GROUPS, TILE_G)[:, None]
        )
    is_open_gS = is_left_gS
    for _ in tl.static_range(TOP_K):
        key_gS = tl.where(is_left_gS, choice_gS, float("-inf"))
        best = tl.max(tl.max(key_gS, axis=1), axis=0)
        tied_gS = tl.where(is_left_gS & (key_gS == best), expert_gS, NUM_GROUPS * GROUP_SIZE)
        is_left_gS = is_left_gS & (expert_gS != tl.min(tl.min(tied_gS, axis=1), axis=0))
    is_chosen_gS = is_open_gS & (is_left_gS == 0)
    is_chosen = tl.reshape(is_chosen_gS.to(tl.int32), (TILE_G * TILE_S,))
    k_of = tl.cumsum(is_chosen, axis=0) - 1  # ascending: its place among the chosen
    weight = tl.reshape(score_gS, (TILE_G * TILE_S,))
    if NORMALISES:
        weight = tl.div_rn(weight, tl.sum(tl.where(is_chosen != 0, weight, 0.0), axis=0) + 1e-20)
    at = row * TOP_K + k_of
    expert = tl.reshape(expert_gS, (TILE_G * TILE_S,))
    tl.store(expert_ptr + at, expert.to(tl.int64), mask=is_chosen != 0)
    tl.store(weight_ptr + at, weight * scale, mask=is_chosen != 0)


def launch(logit_TE: Tensor, bias_E: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """As `reference`; a sigmoid may differ in the last place, and the sum that weights are divided by."""
    check_tensor("logit_TE", logit_TE, (None, None), FLOAT32, logit_TE.device)
    num_tokens, num_experts = logit_TE.shape
    check_tensor("bias_E", bias_E, (num_experts,), FLOAT32, logit_TE.device)
    group_size, remainder = divmod(num_experts, rule.num_groups)
    require(remainder == 0, f"rule.num_groups: {rule.num_groups} for {num_experts} experts")
    num_open = min(rule.top_k_groups, rule.num_groups) * group_size
    require(0 < rule.top_k <= num_open, f"rule.top_k: {rule.top_k} of {num_open} experts in the best groups")
    expert_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.int64, device=logit_TE.device)
    weight_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.float32, device=logit_TE.device)
    if num_tokens:
        _router_topk[num_tokens,](
            logit_TE,
            bias_E,
            expert_TK,
            weight_TK,
            logit_TE.stride(0),
            rule.scale,
            TOP_K=rule.top_k,
            NUM_GROUPS=rule.num_groups,
            TOP_GROUPS=rule.top_k_groups,
            GROUP_SIZE=group_size,
            TILE_G=next_power_of_2(rule.num_groups),
            TILE_S=next_power_of_2(group_size),
            NORMALISES=rule.normalises,
            num_warps=4,
            **OPTIONS,
        )
    return expert_TK, weight_TK


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    E: int = 384
    K: int = 8


CASES = [Case(T=t) for t in (0, 1, 64, 4096)] + [Case(T=64, E=256)]


def cost(case: Case) -> Cost:
    return Cost(4 * (case.T + 1) * case.E + 12 * case.T * case.K, 4 * case.T * case.E)
