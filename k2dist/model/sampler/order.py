"""Logits in order: larger first, of equals the lower token id.

A key is one int64 that holds both, so no two keys of a row are equal and the order of any selection or merge
is decided:    [ float32 as an ordered int32 | 2**32 - 1 - token id ]
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 2**32 - 1


def highest_keys(logits_Nv: Tensor, count: int, first_id: int) -> Tensor:
    """Keys of each row's `count` highest columns, descending: [N, count]. `first_id`: column 0's token."""
    width = logits_Nv.shape[1]
    id_v = torch.arange(first_id, first_id + width, device=logits_Nv.device)
    if count == 0:
        return torch.empty(len(logits_Nv), 0, dtype=torch.int64, device=logits_Nv.device)
    if count == width:
        return keys(logits_Nv, id_v).sort(dim=1, descending=True).values
    if logits_Nv.device.type != "cpu":
        return highest_of_keys(logits_Nv, count, id_v)
    # One more than wanted: if that is smaller than the last, equals at the border cannot have been mixed up.
    top = logits_Nv.topk(count + 1, dim=1)
    key_NC = keys(top.values[:, :count], id_v[top.indices[:, :count]]).sort(dim=1, descending=True).values
    is_tied_N = top.values[:, count] >= top.values[:, count - 1]
    for row in is_tied_N.nonzero()[:, 0].tolist():
        key_NC[row] = keys(logits_Nv[row], id_v).topk(count).values
    return key_NC


def highest_of_keys(logits_Nv: Tensor, count: int, id_v: Tensor) -> Tensor:
    """`highest_keys` for any device: it reads eight bytes a logit in place of four, and nobody waits."""
    return keys(logits_Nv, id_v).topk(count, dim=1).values


def keys(logit_NC: Tensor, id_NC: Tensor) -> Tensor:
    bits_NC = (logit_NC + 0.0).view(torch.int32)  # + 0.0: -0.0 is equal to 0.0
    ordered_NC = bits_NC ^ ((bits_NC >> 31) & (2**31 - 1))
    return (ordered_NC.long() << 32) + (_LOW - id_NC)


def logits_of(key_NC: Tensor) -> Tensor:
    """Float32, as they were (0.0 for -0.0)."""
    ordered_NC = (key_NC >> 32).int()
    return (ordered_NC ^ ((ordered_NC >> 31) & (2**31 - 1))).view(torch.float32)


def ids_of(key_NC: Tensor) -> Tensor:
    """Int64."""
    return _LOW - (key_NC & _LOW)
