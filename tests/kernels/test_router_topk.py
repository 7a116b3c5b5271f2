"""The router: bias, ties, groups, weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import Rule, router_topk

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


def rule(top_k: int, num_groups: int = 1, top_k_groups: int = 1, normalises: bool = True) -> Rule:
    return Rule(
        top_k=top_k, num_groups=num_groups, top_k_groups=top_k_groups, normalises=normalises, scale=2.827
    )


def chosen_by_hand(logits: list[float], bias: list[float], how: Rule) -> dict[int, float]:
    """Expert -> weight, in Python's float64."""
    scores = (1 / (1 + torch.tensor(logits).double().neg().exp())).tolist()
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // how.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(how.num_groups)]
    by_score = sorted(groups, key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
    open_to = [expert for group in by_score[: how.top_k_groups] for expert in group]
    chosen = sorted(open_to, key=lambda expert: (-choice[expert], expert))[: how.top_k]
    total = sum(scores[e] for e in chosen) + 1e-20 if how.normalises else 1.0
    return {expert: scores[expert] / total * how.scale for expert in sorted(chosen)}


@pytest.mark.parametrize(
    ("num_experts", "how"),
    [
        (12, rule(3)),
        (384, rule(8)),
        (16, rule(4, num_groups=4, top_k_groups=2)),
        (256, rule(8, num_groups=8, top_k_groups=4)),
        (12, rule(3, normalises=False)),
    ],
)
def test_choices_and_weights_equal_a_hand_count(num_experts: int, how: Rule) -> None:
    logit_TE, bias_E = torch.randn(40, num_experts) * 2, torch.randn(num_experts) * 0.3
    expert_TK, weight_TK = router_topk.reference(logit_TE, bias_E, how)
    assert expert_TK.dtype == torch.int64
    for logits, experts, weights in zip(
        logit_TE.tolist(), expert_TK.tolist(), weight_TK.tolist(), strict=True
    ):
        by_hand = chosen_by_hand(logits, bias_E.tolist(), how)
        assert experts == list(by_hand), "ascending"
        assert weights == pytest.approx(list(by_hand.values()), rel=1e-5)


def test_the_bias_moves_the_choice_and_not_the_weight() -> None:
    logit_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias_E = torch.tensor([0.0, 0.0, 0.0, 5.0])
    expert_TK, weight_TK = router_topk.reference(logit_TE, bias_E, rule(2))
    assert expert_TK.tolist() == [[0, 3]]
    score = logit_TE[0, [0, 3]].sigmoid()
    assert weight_TK[0].tolist() == pytest.approx((score / score.sum() * 2.827).tolist())


def test_ties_go_to_the_lower_expert_and_group() -> None:
    none_TE, bias_E = torch.zeros(1, 12), torch.zeros(12)
    assert router_topk.reference(none_TE, bias_E, rule(3))[0].tolist() == [[0, 1, 2]]
    grouped = rule(3, num_groups=4, top_k_groups=2)
    assert router_topk.reference(none_TE, bias_E, grouped)[0].tolist() == [[0, 1, 2]]
    bias_E[4] = bias_E[10] = 1.0  # groups 1 and 3 tie, and win
    assert router_topk.reference(none_TE, bias_E, grouped)[0].tolist() == [[3, 4, 10]]


def test_a_token_that_scores_nothing_has_weights() -> None:
    _, weight_TK = router_topk.reference(torch.full((1, 8), -200.0), torch.zeros(8), rule(2))
    assert weight_TK.tolist() == [[0.0, 0.0]]


def test_rows_stand_alone(rows_stand_alone: RowsStandAlone) -> None:
    logit_TE, bias_E = torch.randn(50, 16), torch.randn(16)
    for how in (rule(3), rule(4, num_groups=4, top_k_groups=2)):
        for part in (0, 1):
            rows_stand_alone(
                lambda row_M, how=how, part=part: router_topk.reference(logit_TE[row_M], bias_E, how)[part],
                50,
            )
