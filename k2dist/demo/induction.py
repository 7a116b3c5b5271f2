"""Start a model with one induction circuit, so that a short training has copying to build on.

Copying is most of what the demo does, and attention finds it late: small models sit for thousands of steps
on a plateau, then learn it at once (Olsson et al. 2022, arXiv:2209.11895). Without this start 300 steps gave
no copying at all. These are only first weights, and training moves all of them. Three heads:

    layer 0, heads 0 and 1   attend to the token before and to the one before that, and write what they were
                             into subspaces of the residual (`before`, `earlier`)
    layer 1, head 0          looks for positions where these two are the present token and the one before it,
                             and writes the token found there into `found`, which `lm_head` begins by reading

D hidden, M matched features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from k2dist.demo.trainee import Trainee, rotation_frequencies

_NUM_SHARED = 8  # features that every embedding has alike: without biases, position needs something constant
_NUM_PAIRS = 12  # the fastest rotary pairs tell neighbours apart
_BEFORE, _EARLIER, _FOUND = 48, 32, 48  # widths of the subspaces
_SHARPNESS = 2.5


class _Spaces(NamedTuple):
    """Orthonormal columns, [D, width]."""

    before: Tensor
    earlier: Tensor
    found: Tensor


@torch.no_grad()
def begin_with_copying_(trainee: Trainee, seed: int) -> None:
    """Overwrite parts of the first two layers, the embedding and the head."""
    hidden = trainee.architecture.hidden_size
    rng = torch.Generator().manual_seed(seed)
    columns = torch.randn(hidden - _NUM_SHARED, _BEFORE + _EARLIER + _FOUND, generator=rng)
    basis = torch.cat((torch.zeros(_NUM_SHARED, columns.shape[1]), torch.linalg.qr(columns).Q))
    spaces = _Spaces(*basis.split((_BEFORE, _EARLIER, _FOUND), 1))
    embedding = trainee.weight("model.embed_tokens.weight")
    for space in spaces[:2]:  # left free for what layer 0 writes
        embedding -= embedding @ space @ space.T
    embedding[:, :_NUM_SHARED] = 2.0
    _look_back_(trainee, spaces)
    _match_(trainee, spaces)
    trainee.weight("lm_head.weight").add_(embedding @ spaces.found @ spaces.found.T, alpha=0.15)


def _look_back_(trainee: Trainee, spaces: _Spaces) -> None:
    """q k = sum of cos(frequency (distance - 1 or 2)), from the embeddings' shared features alone."""
    a, prefix = trainee.architecture, "model.layers.0.self_attn."
    shared_D = torch.zeros(a.hidden_size)
    shared_D[:_NUM_SHARED] = _NUM_SHARED**-0.5
    kv_a_CD = trainee.weight(f"{prefix}kv_a_proj_with_mqa.weight")
    kv_a_CD[:, :_NUM_SHARED] = 0
    kv_a_CD[a.kv_lora_rank :] *= 0.1
    kv_a_CD[a.kv_lora_rank : a.kv_lora_rank + 2 * _NUM_PAIRS : 2] += shared_D
    trainee.weight(f"{prefix}q_a_proj.weight")[0] = shared_D
    frequency = rotation_frequencies(a)[:_NUM_PAIRS]
    for head, space in enumerate((spaces.before, spaces.earlier)):
        width = space.shape[1]
        q_RC = _rows(trainee, f"{prefix}q_b_proj.weight", a.qk_head_dim, head)
        q_RC *= 0.1
        angle = frequency * (head + 1)
        turn = torch.stack((angle.cos(), -angle.sin()), -1).flatten().float()
        q_RC[a.qk_nope_head_dim : a.qk_nope_head_dim + 2 * _NUM_PAIRS, 0] = turn
        kv_RC = _rows(trainee, f"{prefix}kv_b_proj.weight", a.qk_nope_head_dim + a.v_head_dim, head)
        kv_RC[a.qk_nope_head_dim : a.qk_nope_head_dim + width] = torch.eye(width, a.kv_lora_rank)
        start = head * a.v_head_dim
        trainee.weight(f"{prefix}o_proj.weight")[:, start : start + width] = space


def _match_(trainee: Trainee, spaces: _Spaces) -> None:
    """Keys read what layer 0 wrote, queries the present token and the one before; values their own token."""
    a, first, prefix = trainee.architecture, "model.layers.0.self_attn.", "model.layers.1.self_attn."
    matched = _BEFORE + _EARLIER
    kv_a_CD = trainee.weight(f"{prefix}kv_a_proj_with_mqa.weight")
    kv_a_CD[: a.kv_lora_rank] = torch.cat(spaces, 1).T
    seen_MD = trainee.weight(f"{first}kv_a_proj_with_mqa.weight")[:_BEFORE]
    q_a_CD = trainee.weight(f"{prefix}q_a_proj.weight")
    q_a_CD[:matched] = torch.cat((seen_MD, spaces.before[:, :_EARLIER].T))
    q_RC = _rows(trainee, f"{prefix}q_b_proj.weight", a.qk_head_dim, 0)
    q_RC *= 0.1
    q_RC[:matched, :matched] = _SHARPNESS * torch.eye(matched)
    kv_RC = _rows(trainee, f"{prefix}kv_b_proj.weight", a.qk_nope_head_dim + a.v_head_dim, 0)
    kv_RC *= 0.1
    kv_RC[:matched, :matched] = torch.eye(matched)
    kv_RC[a.qk_nope_head_dim : a.qk_nope_head_dim + _FOUND, matched:] = torch.eye(_FOUND)
    trainee.weight(f"{prefix}o_proj.weight")[:, :_FOUND] = 1.5 * spaces.found


def _rows(trainee: Trainee, name: str, num_rows: int, head: int) -> Tensor:
    """The rows of one head."""
    return trainee.weight(name)[head * num_rows : (head + 1) * num_rows]
