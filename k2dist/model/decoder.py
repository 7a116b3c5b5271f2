"""The whole forward pass of one rank: the same function alone, on threads, on processes.

    tokens ─ embed, reduce rows ─> h                 a rank keeps h of its own share of the lane's rows
    per layer    h += attention(norm h)              gathers rows, reduces rows (over the lane)
                 h += mlp(norm h)                    dense: gathers and reduces; MoE: an exchange over the world
    rows that sample ─ norm, gather ─ head ─ gather ─> logits of the whole vocabulary, on every tp rank

A rank without rows (no lane, or an idle one) takes part in every MoE layer's exchange and in nothing else.

Legend: t own rows, T rows of the lane, S rows that sample, s own rows among them, D hidden width, V vocabulary,
v this rank's slice of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import Communicator, Exchange
from k2dist.config import Architecture
from k2dist.model.batch import Batch
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
    empty. `observer(name, [t, D])` sees this rank's stream after the embedding and each half of a layer.
    """
    if lane is None or batch.num_rows == 0:
        for moe_layer, experts in enumerate(weights.experts):
            serve(moe_layer, experts, exchange, architecture, kernels)
        return torch.empty(0, architecture.vocab_size, dtype=torch.float32)
    assert weights.lane is not None, "a rank of a lane has a lane's weights"
    assert cache is not None, "a rank of a lane has a cache"
    see = observer or _look_away
    h_tD = _embed(batch, weights.lane, lane, kernels)
    see("embedding", h_tD)
    for index, layer in enumerate(weights.lane.layers):
        x_tD = kernels.rmsnorm(h_tD, layer.attention_norm_D, architecture.rms_norm_eps)
        h_tD = h_tD + attention(x_tD, index, layer.attention, batch, cache, lane, architecture, kernels)
        see(f"layers.{index}.attention", h_tD)
        x_tD = kernels.rmsnorm(h_tD, layer.mlp_norm_D, architecture.rms_norm_eps)
        h_tD = h_tD + _mlp(x_tD, index, layer, weights, batch, lane, exchange, architecture, kernels)
        see(f"layers.{index}.mlp", h_tD)
    return _logits(h_tD, batch, weights.lane, lane, architecture, kernels)


def _look_away(name: str, x_tD: Tensor) -> None:
    pass


def _embed(batch: Batch, weights: LaneWeights, lane: Communicator, kernels: KernelSet) -> Tensor:
    """Each rank gives the rows of its vocabulary slice and zeros for the others: [t, D]."""
    local_T = batch.token_T - weights.first_token
    is_here_T = (local_T >= 0) & (local_T < len(weights.embed_vD))
    partial_TD = weights.embed_vD[local_T.masked_fill(~is_here_T, 0)].float()
    return lane.reduce_rows(partial_TD.masked_fill(~is_here_T[:, None], 0.0), batch.shares, kernels.dtype)


def _mlp(
    x_tD: Tensor,
    index: int,
    layer: Layer,
    weights: Weights,
    batch: Batch,
    lane: Communicator,
    exchange: Exchange,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """The layer's second half: experts, or this rank's slice of a dense MLP."""
    match layer.mlp:
        case Moe() as weights_moe:
            moe_layer = index - architecture.first_dense_layers
            experts = weights.experts[moe_layer]
            return moe(x_tD, moe_layer, weights_moe, experts, exchange, architecture, kernels)
        case Mlp(gate_up, down):
            x_TD = lane.gather_rows(x_tD, batch.shares)
            partial_TD = kernels.mlp(x_TD, gate_up, down, torch.float32)
            return lane.reduce_rows(partial_TD, batch.shares, kernels.dtype)


def _logits(
    h_tD: Tensor,
    batch: Batch,
    weights: LaneWeights,
    lane: Communicator,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """Only the rows that sample are normed, gathered and multiplied: [S, V]."""
    num_samples = len(batch.sample_S)
    if num_samples == 0:
        return torch.empty(0, architecture.vocab_size, dtype=torch.float32)
    order_S = batch.sample_S.argsort(stable=True)
    ends_r = torch.tensor(batch.shares).cumsum(0)
    owner_S = torch.searchsorted(ends_r, batch.sample_S[order_S], right=True)
    picked_s = batch.sample_S[order_S][owner_S == lane.rank] - (
        int(ends_r[lane.rank]) - batch.shares[lane.rank]
    )
    x_sD = kernels.rmsnorm(h_tD[picked_s], weights.norm_D, architecture.rms_norm_eps)
    x_SD = lane.gather_rows(x_sD, owner_S.bincount(minlength=lane.size).tolist())
    logit_Sv = kernels.linear_bf16(x_SD, weights.head_vD, torch.float32)
    slice_rSv = lane.gather_rows(logit_Sv, [num_samples] * lane.size).view(lane.size, num_samples, -1)
    logit_SV = torch.empty(num_samples, architecture.vocab_size, dtype=torch.float32)
    logit_SV[order_S] = slice_rSv.transpose(0, 1).flatten(1)
    return logit_SV
