"""How unevenly a router that prefers some experts loads the ranks of a layout."""

from __future__ import annotations

from statistics import fmean

from k2dist.parallel import Layout
from k2dist.planner.chance import Chance


def imbalance_of(layout: Layout, num_experts: int, top_k: int, skew: float, seed: int = 0) -> float:
    """The busiest rank's load over the mean, averaged over layers: every layer waits for its busiest rank.

    The p-th most wanted expert is wanted in proportion to 1 / p^skew, never in more rows than there are;
    which one that is differs by layer. Copies of an expert share its rows.
    """
    num_layers = len(layout.ranks[0].experts)
    if num_layers == 0 or num_experts == 0:
        return 1.0
    share = _shares(num_experts, top_k, skew)
    chance, found = Chance(seed), []
    for layer in range(num_layers):
        order = list(range(num_experts))
        chance.shuffle_(order)
        copies = [0] * num_experts
        for rank in layout.ranks:
            for expert in rank.experts[layer]:
                copies[expert] += 1
        loads = [
            sum(share[order[expert]] / copies[expert] for expert in rank.experts[layer])
            for rank in layout.ranks
        ]
        found.append(max(loads) / fmean(loads))
    return fmean(found)


def _shares(num_experts: int, top_k: int, skew: float) -> list[float]:
    """Of all rows, the part that each expert gets, the most wanted first; they sum to `top_k`."""
    weights = [1.0 / place**skew for place in range(1, num_experts + 1)]
    left, shares = float(min(top_k, num_experts)), []
    for index, weight in enumerate(weights):
        share = min(left * weight / sum(weights[index:]), 1.0)
        shares.append(share)
        left -= share
    return shares
