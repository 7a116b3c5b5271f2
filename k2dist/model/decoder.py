"""The whole forward pass of one rank: the same function alone, on threads, on processes.

    tokens ─ embed, reduce ─> h               each rank of a lane keeps h of its own share of the lane's rows
    per layer    h += attention(norm h)       gathers and reduces rows over the lane
                 h += mlp(norm h)             dense: gathers and reduces; MoE: an exchange over the world
    rows that sample ─ norm, gather ─ head ─> logits of this rank's slice of the vocabulary

`hidden`, then `head` on as many of its rows at a time as memory allows; `forward` is both, with the slices
gathered: whole rows of logits on every tp rank. `pieces` is `hidden`, stopping before the experts.

A rank without rows (no lane, or an idle one) takes part in every MoE layer's exchange and in nothing else.

Legend: t own rows, T rows of the lane, S rows that sample, s own rows among them, r tp ranks, D hidden width,
V vocabulary, v this rank's slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from k2kernels import Experts, KernelSet
from k2kernels.whole import Numbers, StackWeights
from torch import Tensor

from k2dist.comm import Communicator, TokenExchange
from k2dist.config import Architecture
from k2dist.model.batch import Batch
from k2dist.model.lane_step import LaneStep
from k2dist.model.latent_cache import LatentCache
from k2dist.model.mla import attention, generated_rows
from k2dist.model.moe import moe_pieces, rule, serve
from k2dist.model.pieces import Pieces, in_line
from k2dist.model.weights import LaneWeights, Layer, Mlp, Moe, Weights

Observer = Callable[[str, Tensor], None]


def forward(
    batch: Batch,
    weights: Weights,
    cache: LatentCache | None,
    lane: Communicator | None,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
    observer: Observer | None = None,
) -> Tensor:
    """Logits of `batch.sample_S`: float32 [S, V], the same on all tp ranks. Collective over lane and world.

    The plain way, for comparisons: a rank that serves samples from its slice. Arguments as of `hidden`.
    """
    x_SD = hidden(batch, weights, cache, lane, exchange, architecture, kernels, observer)
    num_rows = len(x_SD)
    if lane is None or weights.lane is None or num_rows == 0:
        return torch.empty(0, architecture.vocab_size, dtype=torch.float32, device=batch.device)
    slice_rSv = lane.gather_rows(head(x_SD, weights.lane, kernels), [num_rows] * lane.size)
    return slice_rSv.view(lane.size, num_rows, -1).transpose(0, 1).flatten(1)


def head(x_SD: Tensor, weights: LaneWeights, kernels: KernelSet) -> Tensor:
    """Logits of this rank's slice of the vocabulary: float32 [S, v]. A row's bits depend on it alone."""
    return kernels.linear_bf16(x_SD, weights.head_vD, torch.float32)


def hidden(
    batch: Batch,
    weights: Weights,
    cache: LatentCache | None,
    lane: Communicator | None,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
    observer: Observer | None = None,
) -> Tensor:
    """Rows `batch.sample_S` after the last norm, [S, D], on all tp ranks. Collective over lane and world.

    Writes the cache at `batch.write_T`. `cache` and `lane` are None on a rank without a lane, whose batch is
    empty. `observer(name, h_tD)` sees this rank's stream after the embedding and each half of a layer.
    """
    return in_line(pieces(batch, weights, cache, lane, exchange, architecture, kernels, observer))


def pieces(
    batch: Batch,
    weights: Weights,
    cache: LatentCache | None,
    lane: Communicator | None,
    exchange: TokenExchange,
    architecture: Architecture,
    kernels: KernelSet,
    observer: Observer | None = None,
) -> Pieces:
    """`hidden`, which stops before the experts of every MoE layer, and goes on with what they give."""
    if lane is None or batch.num_rows == 0:
        for moe_layer, experts in enumerate(weights.experts):
            yield partial(serve, moe_layer, experts, exchange, architecture, kernels, batch.device)
        return torch.empty(0, architecture.hidden_size, dtype=kernels.dtype, device=batch.device)
    assert weights.lane is not None, "a rank of a lane has a lane's weights"
    assert cache is not None, "a rank of a lane has a cache"
    see = observer or _look_away
    step = LaneStep(batch, cache, lane, architecture, kernels)
    h_tD = _embed(weights.lane, step)
    see("embedding", h_tD)
    if observer is None and (slots := _slots_at_home(weights.experts, exchange, step)) is not None:
        x_tD, counts = in_one_call(h_tD, weights.lane, weights.experts, slots, step)
        for moe_layer, counts_e in enumerate(counts):
            exchange.count_at_home(moe_layer, counts_e)
        return x_tD[batch.sample_S]
    for index, layer in enumerate(weights.lane.layers):
        x_tD = kernels.rmsnorm(h_tD, layer.attention_norm_D, architecture.rms_norm_eps)
        h_tD = h_tD + attention(x_tD, index, layer.attention, step)
        see(f"layers.{index}.attention", h_tD)
        x_tD = kernels.rmsnorm(h_tD, layer.mlp_norm_D, architecture.rms_norm_eps)
        delta_tD = yield from _mlp(x_tD, index, layer, weights, exchange, step)
        h_tD = h_tD + delta_tD
        see(f"layers.{index}.mlp", h_tD)
    return _last_rows(h_tD, weights.lane, step)


def _slots_at_home(
    experts: Sequence[Experts], exchange: TokenExchange, step: LaneStep
) -> list[Tensor] | None:
    """Every expert's slot in each MoE layer, where the kernels can take all layers at once; else None."""
    if step.kernels.whole_layers is None or step.lane.size != 1 or step.batch.prompts:
        return None
    slots = [exchange.home_slots(moe_layer) for moe_layer in range(len(experts))]
    here = [slot_E for slot_E in slots if slot_E is not None]
    return here if len(here) == len(slots) else None


def in_one_call(
    h_TD: Tensor, stack: StackWeights, experts: Sequence[Experts], slots: Sequence[Tensor], step: LaneStep
) -> tuple[Tensor, Sequence[Tensor]]:
    """All layers of `stack` and the norm after them: [T, D], and what each slot computed. Uses `h_TD` up."""
    a, whole = step.architecture, step.kernels.whole_layers
    assert whole is not None, "these kernels take one half layer at a time"
    numbers = Numbers(a.rms_norm_eps, a.inner_norm_eps, a.softmax_scale, rule(a))
    return whole(h_TD, stack, experts, slots, generated_rows(step), step.cache, numbers)


def _look_away(name: str, h_tD: Tensor) -> None:
    """The observer where nobody looks."""


def _embed(weights: LaneWeights, step: LaneStep) -> Tensor:
    """Each rank gives the rows of its vocabulary slice and zeros for the others: [t, D].

    Alone it has all rows: eight small calls of torch are 0.2 ms of a decode step on a CPU.
    """
    if step.lane.size == 1:
        return weights.embed_vD[step.batch.token_T]
    local_T = step.batch.token_T - weights.first_token
    is_here_T = (local_T >= 0) & (local_T < len(weights.embed_vD))
    partial_TD = weights.embed_vD[local_T.masked_fill(~is_here_T, 0)].float()
    return step.reduce(partial_TD.masked_fill(~is_here_T[:, None], 0.0))


def _mlp(
    x_tD: Tensor, index: int, layer: Layer, weights: Weights, exchange: TokenExchange, step: LaneStep
) -> Pieces:
    """The layer's second half: experts, or this rank's slice of a dense MLP."""
    architecture, kernels = step.architecture, step.kernels
    match layer.mlp:
        case Moe():
            moe_layer = index - architecture.first_dense_layers
            experts = weights.experts[moe_layer]
            return (
                yield from moe_pieces(x_tD, moe_layer, layer.mlp, experts, exchange, architecture, kernels)
            )
        case Mlp():
            partial_TD = kernels.mlp(step.gather(x_tD), layer.mlp.gate_up, layer.mlp.down, torch.float32)
            return step.reduce(partial_TD)


def _last_rows(h_tD: Tensor, weights: LaneWeights, step: LaneStep) -> Tensor:
    """Rows that sample, normed: [S, D], in the order asked for.

    All are normed and gathered, once in a step: which rank has which of those that sample would have to be
    asked of the device.
    """
    if len(step.batch.sample_S) == 0:
        return h_tD[:0]
    x_tD = step.kernels.rmsnorm(h_tD, weights.norm_D, step.architecture.rms_norm_eps)
    return step.gather(x_tD)[step.batch.sample_S]
