"""A mixture-of-experts layer: the router at home, experts wherever their slots are, the sum at home again.

    own rows ─ route ─ dispatch ─> experts of all ranks ─ combine ─> weigh, sum by ascending expert, + shared

Every rank of the world makes the same calls in every MoE layer, with rows or without: each is a collective.

Legend: t rows of this rank, N rows arrived, W columns of a wire row, M pairs of row and slot, E experts,
K experts of a row, D hidden width.
Source: DeepSeek-V3 report, arXiv:2412.19437, section 2.1.2; k2_facts 2.5 and 2.6.
"""

from __future__ import annotations

from functools import partial

import torch
from k2kernels import Experts, KernelSet, Rule
from torch import Tensor

from k2dist.comm import TokenExchange
from k2dist.config import Architecture
from k2dist.model.pieces import Pieces, in_line
from k2dist.model.weights import Moe


def moe(
    x_tD: Tensor,
    moe_layer: int,
    weights: Moe,
    experts: Experts,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """The normed stream of this rank's rows in, the layer's output for them out: [t, D]. Collective."""
    return in_line(moe_pieces(x_tD, moe_layer, weights, experts, exchange, architecture, kernels))


def moe_pieces(
    x_tD: Tensor,
    moe_layer: int,
    weights: Moe,
    experts: Experts,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
) -> Pieces:
    """`moe`, which stops before the experts and goes on with what they give. All in one call, and without a
    stop, where the kernels can and nothing travels."""
    if kernels.whole_moe is not None and (slot_E := exchange.home_slots(moe_layer)) is not None:
        how = rule(architecture)
        y_tD, counts_e = kernels.whole_moe(x_tD, weights.router, how, weights.shared, experts, slot_E)
        exchange.count_at_home(moe_layer, counts_e)
        return y_tD
    logit_tE = kernels.router_logits(x_tD, weights.router.w_ED)
    expert_tK, weight_tK = kernels.router_topk(logit_tE, weights.router.bias_E, rule(architecture))
    out_tKD = yield partial(
        through_experts, x_tD, expert_tK, moe_layer, experts, exchange, architecture, kernels
    )
    shared_tD = kernels.mlp(x_tD, weights.shared.gate_up, weights.shared.down, torch.float32)
    return kernels.weighted_sum(out_tKD, weight_tK, shared_tD, kernels.dtype)


def serve(
    moe_layer: int,
    experts: Experts,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
    device: torch.device,
) -> Tensor:
    """Take part in a layer without rows of one's own: [0, K, D]. Collective."""
    x_tD = torch.empty(0, architecture.hidden_size, dtype=kernels.dtype, device=device)
    expert_tK = torch.empty(0, architecture.top_k, dtype=torch.int64, device=device)
    return through_experts(x_tD, expert_tK, moe_layer, experts, exchange, architecture, kernels)


def through_experts(
    x_tD: Tensor,
    expert_tK: Tensor,
    moe_layer: int,
    experts: Experts,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """The output of each row's experts, unweighted: [t, K, D] in the kernels' return dtype. Collective."""
    block = architecture.scale_block
    work, ticket = exchange.dispatch(moe_layer, kernels.wire_pack(x_tD, block), expert_tK)
    rows = kernels.wire_unpack(work.rows_NW, architecture.hidden_size, block)
    out_MD = kernels.experts(rows, work.row_M, work.counts_per_slot, experts)
    return exchange.combine(out_MD, ticket)


def rule(architecture: Architecture) -> Rule:
    """How this model's router chooses."""
    return Rule(
        top_k=architecture.top_k,
        num_groups=architecture.num_groups,
        top_k_groups=architecture.top_k_groups,
        normalises=architecture.norm_top_k,
        scale=architecture.routed_scale,
    )
