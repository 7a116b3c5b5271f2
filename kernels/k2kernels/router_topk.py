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

import torch
from torch import Tensor

from k2kernels.cost import Cost
from k2kernels.rows import sigmoid, tree_sum


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


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    E: int = 384
    K: int = 8


CASES = [Case(T=t) for t in (0, 1, 64, 4096)] + [Case(T=64, E=256)]


def cost(case: Case) -> Cost:
    return Cost(4 * (case.T + 1) * case.E + 12 * case.T * case.K, 4 * case.T * case.E)
