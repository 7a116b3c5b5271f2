"""How many bytes of weights a rank reads and holds, by kind.

Held is not read: kernels lay weights out anew. The up-projection of the latent (kv_b) is absorbed,
unquantised; router weights are widened to float32; the reference kernels hold every linear dequantised in
float32. `k2dist.model.weights.assemble` is what this describes, and a test compares the two.
"""

from __future__ import annotations

import enum

from k2dist.config.architecture import Architecture
from k2dist.messages import Message
from k2dist.parallel.published import (
    DTYPE_BYTES,
    SCALE_SUFFIX,
    Published,
    Share,
    published_tensors,
)
from k2dist.planner.terms import Form

ROUTER_BYTES = 4  # float32, whatever the file holds


class Kind(enum.StrEnum):
    """What a weight is for."""

    EXPERTS = "experts"
    ATTENTION = "attention"
    SHARED_EXPERT = "shared expert"
    DENSE = "dense layers"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    NORMS = "norms"


class LaneBytes(Message, frozen=True, kw_only=True):
    """Weights of one layout's ranks besides experts; the same on every rank of every lane."""

    read: dict[Kind, int]
    held: dict[Kind, int]


def lane_bytes(architecture: Architecture, tp: int, form: Form) -> LaneBytes:
    """What each rank of a lane reads and holds besides experts."""
    read = dict.fromkeys(Kind, 0)
    held = dict.fromkeys(Kind, 0)
    for tensor in published_tensors(architecture):
        if tensor.share is not Share.EXPERT:
            kind = kind_of(tensor)
            parts = tp if tensor.share in (Share.ROWS, Share.COLUMNS) else 1
            read[kind] += tensor.num_bytes // parts
            held[kind] += _held(tensor, form) // parts
    return LaneBytes(read=read, held=held)


def expert_bytes(architecture: Architecture, form: Form | None = None) -> int:
    """One expert of one layer: as published, or as `form` holds it."""
    if not architecture.num_moe_layers:
        return 0
    total = 0
    for tensor in published_tensors(architecture):
        if tensor.expert == 0 and tensor.layer == architecture.first_dense_layers:
            total += tensor.num_bytes if form is None else _held(tensor, form)
        elif tensor.layer == architecture.first_dense_layers + 1:
            break
    return total


def kind_of(tensor: Published) -> Kind:
    """By its published name."""
    name = tensor.name
    if tensor.share is Share.EXPERT:
        return Kind.EXPERTS
    if name == "model.embed_tokens.weight":
        return Kind.EMBEDDING
    if name == "lm_head.weight":
        return Kind.HEAD
    if name.endswith("norm.weight"):
        return Kind.NORMS
    for part, kind in (
        (".self_attn.", Kind.ATTENTION),
        (".mlp.gate.", Kind.ROUTER),
        (".mlp.shared_experts.", Kind.SHARED_EXPERT),
        (".mlp.", Kind.DENSE),
    ):
        if part in name:
            return kind
    raise AssertionError(f"{name}: of no kind")


def _held(tensor: Published, form: Form) -> int:
    """Of the whole tensor, in `form`."""
    num_elements = tensor.num_bytes // DTYPE_BYTES[tensor.dtype]
    kind = kind_of(tensor)
    if kind is Kind.ROUTER:
        return num_elements * ROUTER_BYTES
    if kind in (Kind.NORMS, Kind.EMBEDDING):
        return num_elements * form.stream_bytes
    if kind is Kind.HEAD:
        return num_elements * form.plain_bytes
    is_scale = tensor.name.endswith(SCALE_SUFFIX)
    if ".kv_b_proj." in tensor.name:
        return 0 if is_scale else num_elements * form.plain_bytes
    if form.linear_bytes is not None:
        return 0 if is_scale else num_elements * form.linear_bytes
    return tensor.num_bytes
