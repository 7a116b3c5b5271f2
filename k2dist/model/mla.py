"""Multi-head latent attention of one layer, over the lane's tp ranks and the paged latent cache.

    own rows   x ─ q_a, kv_a ─ norms, rope ─┐                         every rank: its share of the rows, all heads
    all rows                    gather rows ┴─ q_b, rope ─ write latents ─ attend ─ o ─┐     all rows, its heads
    own rows                                                               reduce rows ┴─

The a-projections run on a rank's own rows, so 2,112 columns are gathered in place of 7,168. Prompt rows attend
decompressed, generated rows absorbed; both read every key, their own too, from the cache.

Legend: t own rows, T rows of the lane, R decode rows, h heads of this rank, D hidden width, Q query rank,
L latent width, N unrotated and P rotary width of a head, V value width.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2; k2_facts 2.1 and 2.2.
"""

from __future__ import annotations

import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import Communicator
from k2dist.config import Architecture
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache
from k2dist.model.weights import Mla


def attention(
    x_tD: Tensor,
    layer: int,
    weights: Mla,
    batch: Batch,
    cache: LatentCache,
    lane: Communicator,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """The normed stream of this rank's rows in, attention's output for them out: [t, D]. Collective."""
    compressed_tA = _compress(
        x_tD, weights, _own(batch.position_T, batch, lane.rank), cache, architecture, kernels
    )
    widths = (architecture.q_lora_rank, architecture.kv_lora_rank, architecture.qk_rope_head_dim)
    q_TQ, latent_TL, key_TP = lane.gather_rows(compressed_tA, batch.shares).split(widths, dim=-1)
    kernels.latent_write_(cache.layers[layer], batch.write_T, latent_TL, key_TP)

    q_ThD = _queries(q_TQ, weights, batch.position_T, cache, architecture, kernels)
    out_ThV = q_ThD.new_empty(*q_ThD.shape[:2], architecture.v_head_dim)
    _attend_prompts_(out_ThV, q_ThD, layer, weights, batch, cache, architecture, kernels)
    if len(batch.decode_row_R):
        out_ThV[batch.decode_row_R] = _attend_absorbed(
            q_ThD[batch.decode_row_R], layer, weights, batch, cache, architecture, kernels
        )
    partial_TD = kernels.linear(out_ThV.flatten(1), weights.o, torch.float32)
    return lane.reduce_rows(partial_TD, batch.shares, kernels.dtype)


def _own(position_T: Tensor, batch: Batch, rank: int) -> Tensor:
    """This rank's share of a tensor over all rows."""
    return position_T.split(batch.shares)[rank]


def _compress(
    x_tD: Tensor,
    weights: Mla,
    position_t: Tensor,
    cache: LatentCache,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """[normed query latent | normed latent | rotated key part]: [t, Q + L + P]."""
    widths = (architecture.q_lora_rank, architecture.kv_lora_rank, architecture.qk_rope_head_dim)
    q_tQ, latent_tL, key_tP = kernels.linear(x_tD, weights.qkv_a).split(widths, dim=-1)
    q_tQ = kernels.rmsnorm(q_tQ, weights.q_norm_Q, architecture.inner_norm_eps)
    latent_tL = kernels.rmsnorm(latent_tL, weights.kv_norm_L, architecture.inner_norm_eps)
    cos_tF, sin_tF = cache.rope.cos_PF[position_t], cache.rope.sin_PF[position_t]
    key_tP = kernels.rope(key_tP[:, None], cos_tF, sin_tF)[:, 0]
    return torch.cat((q_tQ, latent_tL, key_tP), dim=-1)


def _queries(
    q_TQ: Tensor,
    weights: Mla,
    position_T: Tensor,
    cache: LatentCache,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """[unrotated | rotated] queries of this rank's heads: [T, h, N + P]."""
    nope = architecture.qk_nope_head_dim
    q_ThD = kernels.linear(q_TQ, weights.q_b).unflatten(-1, (-1, architecture.qk_head_dim))
    cos_TF, sin_TF = cache.rope.cos_PF[position_T], cache.rope.sin_PF[position_T]
    return torch.cat((q_ThD[..., :nope], kernels.rope(q_ThD[..., nope:], cos_TF, sin_TF)), dim=-1)


def _attend_prompts_(
    out_ThV: Tensor,
    q_ThD: Tensor,
    layer: int,
    weights: Mla,
    batch: Batch,
    cache: LatentCache,
    architecture: Architecture,
    kernels: KernelSet,
) -> None:
    """Write the prompt rows of `out_ThV`."""
    for prompt in batch.prompts:
        rows = slice(prompt.row, prompt.row + prompt.num_rows)
        out_ThV[rows] = kernels.mla_prefill(
            q_ThD[rows],
            cache.layers[layer],
            prompt.page_table,
            cache.page_tokens,
            prompt.start,
            weights.w_uk_hNL,
            weights.w_uv_hLV,
            architecture.softmax_scale,
        )


def _attend_absorbed(
    q_RhD: Tensor,
    layer: int,
    weights: Mla,
    batch: Batch,
    cache: LatentCache,
    architecture: Architecture,
    kernels: KernelSet,
) -> Tensor:
    """Decode rows: queries go into the latent space, and what they find there comes out as values."""
    nope = architecture.qk_nope_head_dim
    q_latent_RhL = kernels.absorb(q_RhD[..., :nope], weights.w_uk_hNL)
    found_RhL = kernels.mla_decode(
        torch.cat((q_latent_RhL, q_RhD[..., nope:]), dim=-1),
        cache.layers[layer],
        batch.decode_page_RP,
        cache.page_tokens,
        batch.decode_length_R,
        architecture.kv_lora_rank,
        architecture.softmax_scale,
    )
    return kernels.absorb(found_RhL, weights.w_uv_hLV)
