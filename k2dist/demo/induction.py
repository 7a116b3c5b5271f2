"""Start a model with one induction circuit, so that a short training has copying to build on.

Copying is most of what the demo does, and attention finds it late: small models sit for thousands of steps
on a plateau, then learn it at once (Olsson et al. 2022, arXiv:2209.11895). Without this start 300 steps gave
no copying at all. These are only first weights, and training moves all of them. Two heads, as in that paper:

    layer 0, head 0   attends to the token before and writes what it was into the residual (subspace B)
    layer 1, head 0   looks for positions whose B matches the present token, and writes the token found there
                      into the residual (subspace R), from which `lm_head` begins by reading

D hidden, C latent, O one head's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2dist.demo.trainee import Trainee, rotation_frequencies

_NUM_SHARED = 8  # features that every embedding has alike: without biases, position needs something constant
_NUM_PAIRS = 12  # the fastest rotary pairs tell neighbours apart
_NUM_MATCHED = 64  # features that queries and keys are compared in


@torch.no_grad()
def begin_with_copying_(trainee: Trainee, seed: int) -> None:
    """Overwrite parts of the first two layers, the embedding and the head."""
    hidden, latent = trainee.architecture.hidden_size, trainee.architecture.kv_lora_rank
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(hidden - _NUM_SHARED, latent + _NUM_MATCHED, generator=rng)).Q
    basis = torch.cat((torch.zeros(_NUM_SHARED, basis.shape[1]), basis))
    before_DC, found_DM = basis[:, :latent], basis[:, latent:]
    embedding = trainee.weight("model.embed_tokens.weight")
    embedding[:, :_NUM_SHARED] = 2.0
    _previous_token_(trainee, before_DC)
    _matching_token_(trainee, before_DC, found_DM)
    trainee.weight("lm_head.weight").add_(embedding @ found_DM @ found_DM.T, alpha=0.15)


def _previous_token_(trainee: Trainee, before_DC: Tensor) -> None:
    """q k = sum of cos(frequency (distance - 1)), from the embeddings' shared features alone."""
    a, prefix = trainee.architecture, "model.layers.0.self_attn."
    shared_D = torch.zeros(a.hidden_size)
    shared_D[:_NUM_SHARED] = _NUM_SHARED**-0.5
    trainee.weight(f"{prefix}q_a_proj.weight")[0] = shared_D
    q_RC = _head(trainee, f"{prefix}q_b_proj.weight", a.qk_head_dim)
    q_RC *= 0.1
    frequency = rotation_frequencies(a)[:_NUM_PAIRS]
    turn = torch.stack((frequency.cos(), -frequency.sin()), -1).flatten().float()
    q_RC[a.qk_nope_head_dim : a.qk_nope_head_dim + 2 * _NUM_PAIRS, 0] = turn
    kv_a_CD = trainee.weight(f"{prefix}kv_a_proj_with_mqa.weight")
    kv_a_CD[:, :_NUM_SHARED] = 0
    kv_a_CD[a.kv_lora_rank :] *= 0.1
    kv_a_CD[a.kv_lora_rank : a.kv_lora_rank + 2 * _NUM_PAIRS : 2] += shared_D
    _head(trainee, f"{prefix}kv_b_proj.weight", a.qk_nope_head_dim + a.v_head_dim)[a.qk_nope_head_dim :] = (
        torch.eye(a.v_head_dim, a.kv_lora_rank)
    )
    trainee.weight(f"{prefix}o_proj.weight")[:, : a.v_head_dim] = 0.7 * before_DC


def _matching_token_(trainee: Trainee, before_DC: Tensor, found_DM: Tensor) -> None:
    """Keys read what layer 0 wrote, queries the present token; values carry the key's own token."""
    a, first, prefix = trainee.architecture, "model.layers.0.self_attn.", "model.layers.1.self_attn."
    kv_a_CD = trainee.weight(f"{prefix}kv_a_proj_with_mqa.weight")
    kv_a_CD[:_NUM_MATCHED] = before_DC[:, :_NUM_MATCHED].T
    kv_a_CD[_NUM_MATCHED : 2 * _NUM_MATCHED] = found_DM.T
    seen_CD = trainee.weight(f"{first}kv_a_proj_with_mqa.weight")[:_NUM_MATCHED]
    trainee.weight(f"{prefix}q_a_proj.weight")[:_NUM_MATCHED] = seen_CD
    q_RC = _head(trainee, f"{prefix}q_b_proj.weight", a.qk_head_dim)
    q_RC *= 0.1
    q_RC[:_NUM_MATCHED, :_NUM_MATCHED] = 2.5 * torch.eye(_NUM_MATCHED)
    kv_RC = _head(trainee, f"{prefix}kv_b_proj.weight", a.qk_nope_head_dim + a.v_head_dim)
    kv_RC *= 0.1
    kv_RC[:_NUM_MATCHED, :_NUM_MATCHED] = torch.eye(_NUM_MATCHED)
    values = slice(a.qk_nope_head_dim, a.qk_nope_head_dim + _NUM_MATCHED)
    kv_RC[values, _NUM_MATCHED : 2 * _NUM_MATCHED] = torch.eye(_NUM_MATCHED)
    trainee.weight(f"{prefix}o_proj.weight")[:, :_NUM_MATCHED] = 1.5 * found_DM


def _head(trainee: Trainee, name: str, rows: int) -> Tensor:
    """The rows of head 0."""
    return trainee.weight(name)[:rows]
