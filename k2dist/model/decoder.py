"""The whole forward pass of one rank: the same function alone, on threads, on processes.

    tokens ─ embed, reduce ─> h               each rank of a lane keeps h of its own share of the lane's rows
    per layer    h += attention(norm h)       gathers and reduces rows over the lane
                 h += mlp(norm h)             dense: gathers and reduces; MoE: an exchange over the world
    rows that sample ─ norm, gather ─ head ─ gather ─> logits of the whole vocabulary, on every tp rank

A rank without rows (no lane, or an idle one) takes part in every MoE layer's exchange and in nothing else.

Legend: t own rows, T rows of the lane, S rows that sample, s own rows among them, r tp ranks, D hidden width,
V vocabulary, v this rank's slice of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import Communicator, Exchange
from k2dist.config import Architecture
from k2dist.model.batch import Batch
from k2dist.model.lane_step import LaneStep
from k2dist.model.latent_cache import LatentCache
from k2dist.model.mla import attention
from k2dist.model.moe import moe, serve
from k2dist.model.weights import LaneWeights, Layer, Mlp, Moe, Weights

Observer = Callable[[str, Tensor], None]


def forward(
    batch: Batch,
    weights: Weights,
    cache: LatentCache | None,
    lane: Communicator | None,
    exchange: Exchange,
    architecture: Architecture,
    kernels: KernelSet,
    observer: Observer | None = None,
) -> Tensor:
    """Logits of `batch.sample_S`: float32 [S, V], the same on all tp ranks. Collective over lane and world.

    Writes the cache at `batch.write_T`. `cache` and `lane` are None on a rank without a lane, whose batch is
    empty. `observer(name, h_tD)` sees this rank's stream after the embedding and each half of a layer.
    """
    if lane is None or batch.num_rows == 0:
        for moe_layer, experts in enumerate(weights.experts):
            serve(moe_layer, experts, exchange, architecture, kernels)
        return torch.empty(0, architecture.vocab_size, dtype=torch.float32)
    assert weights.lane is not None, "a rank of a lane has a lane's weights"
    assert cache is not None, "a rank of a lane has a cache"
    see = observer or _look_away
    step = LaneStep(batch, cache, lane, architecture, kernels)
    h_tD = _embed(weights.lane, step)
    see("embedding", h_tD)
    for index, layer in enumerate(weights.lane.layers):
        x_tD = kernels.rmsnorm(h_tD, layer.attention_norm_D, architecture.rms_norm_eps)
        h_tD = h_tD + attention(x_tD, index, layer.attention, step)
        see(f"layers.{index}.attention", h_tD)
        x_tD = kernels.rmsnorm(h_tD, layer.mlp_norm_D, architecture.rms_norm_eps)
        h_tD = h_tD + _mlp(x_tD, index, layer, weights, exchange, step)
        see(f"layers.{index}.mlp", h_tD)
    return _logits(h_tD, weights.lane, step)


def _look_away(name: str, h_tD: Tensor) -> None:
    """The observer where nobody looks."""


def _embed(weights: LaneWeights, step: LaneStep) -> Tensor:
    """Each rank gives the rows of its vocabulary slice and zeros for the others: [t, D]."""
    local_T = step.batch.token_T - weights.first_token
    is_here_T = (local_T >= 0) & (local_T < len(weights.embed_vD))
    partial_TD = weights.embed_vD[local_T.masked_fill(~is_here_T, 0)].float()
    return step.reduce(partial_TD.masked_fill(~is_here_T[:, None], 0.0))


def _mlp(
    x_tD: Tensor, index: int, layer: Layer, weights: Weights, exchange: Exchange, step: LaneStep
) -> Tensor:
    """The layer's second half: experts, or this rank's slice of a dense MLP."""
    architecture, kernels = step.architecture, step.kernels
    match layer.mlp:
        case Moe():
            moe_layer = index - architecture.first_dense_layers
            experts = weights.experts[moe_layer]
            return moe(x_tD, moe_layer, layer.mlp, experts, exchange, architecture, kernels)
        case Mlp():
            partial_TD = kernels.mlp(step.gather(x_tD), layer.mlp.gate_up, layer.mlp.down, torch.float32)
            return step.reduce(partial_TD)


def _logits(h_tD: Tensor, weights: LaneWeights, step: LaneStep) -> Tensor:
    """Only the rows that sample are normed, gathered and multiplied: [S, V]."""
    lane, kernels, architecture = step.lane, step.kernels, step.architecture
    row_S, order_S = step.batch.sample_S.sort(stable=True)
    num_samples = len(row_S)
    logit_SV = torch.empty(num_samples, architecture.vocab_size, dtype=torch.float32)
    if num_samples == 0:
        return logit_SV
    owner_S = torch.searchsorted(torch.tensor(step.batch.shares).cumsum(0), row_S, right=True)
    own_s = row_S[owner_S == lane.rank] - step.first_row
    x_sD = kernels.rmsnorm(h_tD[own_s], weights.norm_D, architecture.rms_norm_eps)
    x_SD = lane.gather_rows(x_sD, owner_S.bincount(minlength=lane.size).tolist())
    slice_Sv = kernels.linear_bf16(x_SD, weights.head_vD, torch.float32)
    slice_rSv = lane.gather_rows(slice_Sv, [num_samples] * lane.size).view(lane.size, num_samples, -1)
    logit_SV[order_S] = slice_rSv.transpose(0, 1).flatten(1)
    return logit_SV
