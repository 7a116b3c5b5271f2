"""Multi-head latent attention of one layer, over the lane's tp ranks and the paged latent cache.

    own rows, all heads    x ─ q_a, kv_a ─ norms, rope ─ gather ─┐
    all rows, own heads    ┌─ q_b, rope ─ write latents ─ attend ─ o ─┐
    own rows, all heads    └────────────────────────────────── reduce ┴─>

The a-projections run on a rank's own rows, so 2,112 columns are gathered in place of 7,168. Prompt rows
attend decompressed, generated rows absorbed; both read every key, their own too, from the cache.

Legend: t own rows, T rows of the lane, R decode rows, h heads of this rank, D hidden or head width, Q query
rank, L latent width, N unrotated and P rotary width of a head, V value width, A = Q + L + P.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2; k2_facts 2.1 and 2.2.
"""

from __future__ import annotations

import torch
from k2kernels.whole import GeneratedRows, WholeAttention
from torch import Tensor

from k2dist.model.lane_step import LaneStep
from k2dist.model.weights import Mla


def attention(x_tD: Tensor, layer: int, weights: Mla, step: LaneStep) -> Tensor:
    """The normed stream of this rank's rows in, attention's output for them out: [t, D]. Collective."""
    batch, kernels = step.batch, step.kernels
    if kernels.whole_attention is not None and step.lane.size == 1 and not batch.prompts:
        return _in_one_call(kernels.whole_attention, x_tD, layer, weights, step)
    q_TQ, latent_TL, key_TP = _parted(step.gather(_compress(x_tD, weights, step)), step)
    cache_CD = step.cache.layers[layer]
    kernels.latent_write_(cache_CD, batch.write_T, latent_TL, key_TP)

    q_ThD = _queries(q_TQ, weights, step)
    if batch.prompts:
        out_ThV = q_ThD.new_empty(*q_ThD.shape[:2], step.architecture.v_head_dim)
        _attend_prompts_(out_ThV, q_ThD, cache_CD, weights, step)
        if len(batch.decode_row_R):
            q_RhD = q_ThD[batch.decode_row_R]
            out_ThV[batch.decode_row_R] = _attend_absorbed(q_RhD, cache_CD, weights, step)
    else:  # generated rows are all rows, in their order
        out_ThV = _attend_absorbed(q_ThD, cache_CD, weights, step)
    return step.reduce(kernels.linear(out_ThV.flatten(1), weights.o, torch.float32))


def _in_one_call(whole: WholeAttention, x_TD: Tensor, layer: int, weights: Mla, step: LaneStep) -> Tensor:
    """All that `attention` does, where no row travels and each is a generated one, in the batch's order."""
    rope, eps, scale = step.cache.rope, step.architecture.inner_norm_eps, step.architecture.softmax_scale
    cache_CD = step.cache.layers[layer]
    return whole(x_TD, weights, generated_rows(step), cache_CD, rope.cos_PF, rope.sin_PF, eps, scale)


def generated_rows(step: LaneStep) -> GeneratedRows:
    """Of a step without prompts."""
    batch = step.batch
    return GeneratedRows(
        batch.position_T, batch.write_T, batch.decode_length_R, batch.decode_page_RP, step.cache.page_tokens
    )


def _compress(x_tD: Tensor, weights: Mla, step: LaneStep) -> Tensor:
    """[normed query latent | normed latent | rotated key part]: [t, A]. The key part is not normed."""
    kernels, eps = step.kernels, step.architecture.inner_norm_eps
    q_tQ, latent_tL, key_tP = _parted(kernels.linear(x_tD, weights.qkv_a), step)
    cos_tF, sin_tF = step.own(step.cos_TF), step.own(step.sin_TF)
    parts = (
        kernels.rmsnorm(q_tQ, weights.q_norm_Q, eps),
        kernels.rmsnorm(latent_tL, weights.kv_norm_L, eps),
        kernels.rope(key_tP[:, None], cos_tF, sin_tF)[:, 0],
    )
    return torch.cat(parts, dim=-1)


def _parted(x_TA: Tensor, step: LaneStep) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the query latent, the latent and the rotary key."""
    first, second = step.architecture.q_lora_rank, step.architecture.kv_lora_rank
    return x_TA[:, :first], x_TA[:, first : first + second], x_TA[:, first + second :]


def _queries(q_TQ: Tensor, weights: Mla, step: LaneStep) -> Tensor:
    """[unrotated | rotated] queries of this rank's heads: [T, h, N + P]."""
    nope = step.architecture.qk_nope_head_dim
    q_ThD = step.kernels.linear(q_TQ, weights.q_b).view(len(q_TQ), -1, step.architecture.qk_head_dim)
    rotated_ThP = step.kernels.rope(q_ThD[..., nope:], step.cos_TF, step.sin_TF)
    return torch.cat((q_ThD[..., :nope], rotated_ThP), dim=-1)


def _attend_prompts_(out_ThV: Tensor, q_ThD: Tensor, cache_CD: Tensor, weights: Mla, step: LaneStep) -> None:
    """Write the prompt rows of `out_ThV`."""
    for prompt in step.batch.prompts:
        rows = slice(prompt.row, prompt.row + prompt.num_rows)
        out_ThV[rows] = step.kernels.mla_prefill(
            q_ThD[rows],
            cache_CD,
            prompt.page_table,
            step.cache.page_tokens,
            prompt.start,
            weights.w_uk_hNL,
            weights.w_uv_hLV,
            step.architecture.softmax_scale,
        )


def _attend_absorbed(q_RhD: Tensor, cache_CD: Tensor, weights: Mla, step: LaneStep) -> Tensor:
    """Queries go into the latent space, and what they find there comes out as values: [R, h, V]."""
    nope, kernels = step.architecture.qk_nope_head_dim, step.kernels
    q_latent_RhL = kernels.absorb(q_RhD[..., :nope], weights.w_uk_hNL)
    found_RhL = kernels.mla_decode(
        torch.cat((q_latent_RhL, q_RhD[..., nope:]), dim=-1),
        cache_CD,
        step.batch.decode_page_RP,
        step.cache.page_tokens,
        step.batch.decode_length_R,
        step.architecture.kv_lora_rank,
        step.architecture.softmax_scale,
    )
    return kernels.absorb(found_RhL, weights.w_uv_hLV)
