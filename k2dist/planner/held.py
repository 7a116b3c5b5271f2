"""How many bytes of weights a rank reads and holds, by kind.

Held is not read: kernels lay weights out anew, each set in its own way (`terms.Form`). The up-projection of
the latent (kv_b) is absorbed, in float8 by the native set alone; router weights are widened to float32. What
this describes is `k2dist.model.weights.assemble`, and a test compares the two for every set.
"""

from __future__ import annotations

import enum
from functools import cache

from k2dist.config.architecture import Architecture
from k2dist.messages import Message
from k2dist.parallel.published import (
    DTYPE_BYTES,
    SCALE_SUFFIX,
    Published,
    Share,
    end_tensors,
    layer_tensors,
)
from k2dist.planner.terms import Form

FLOAT32_BYTES = 4
BF16_BYTES = 2
# Of the native kernels' layout (k2kernels.native.packed).
PANEL = 16  # outputs
PANEL_DEPTH = 32  # inputs; a block of fewer is filled up
PLAIN_BLOCK = 128  # rows and columns of a block where no scale sets it


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
    for tensor, times in _shared_tensors(architecture):
        kind = kind_of(tensor)
        parts = tp if tensor.share in (Share.ROWS, Share.COLUMNS) else 1
        read[kind] += times * tensor.num_bytes // parts
        held[kind] += times * _held(tensor, tp, architecture, form)
    return LaneBytes(read=read, held=held)


@cache
def _shared_tensors(architecture: Architecture) -> tuple[tuple[Published, int], ...]:
    """What is no expert's: of one layer of each sort, with how many layers are like it, and of the ends."""
    a = architecture
    found = [(tensor, 1) for tensor in end_tensors(a)]
    for layer, times in ((0, a.first_dense_layers), (a.first_dense_layers, a.num_moe_layers)):
        if times:
            tensors = layer_tensors(a, layer)
            found += [(tensor, times) for tensor in tensors if tensor.share is not Share.EXPERT]
    return tuple(found)


def expert_bytes(architecture: Architecture, form: Form | None = None) -> int:
    """One expert of one layer: as published, or as `form` holds it."""
    return sum(
        tensor.num_bytes if form is None else _held(tensor, 1, architecture, form)
        for tensor in _first_expert(architecture)
    )


@cache
def _first_expert(architecture: Architecture) -> tuple[Published, ...]:
    """Its tensors in one layer: all experts are alike."""
    a = architecture
    if not a.num_moe_layers:
        return ()
    return tuple(tensor for tensor in layer_tensors(a, a.first_dense_layers) if tensor.expert == 0)


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


def _held(tensor: Published, tp: int, architecture: Architecture, form: Form) -> int:
    """Of one rank's slice of a tensor, in `form`. A scale counts with its weight where it changes shape."""
    rows, cols = _slice(tensor, tp)
    kind, is_scale = kind_of(tensor), tensor.name.endswith(SCALE_SUFFIX)
    if kind is Kind.ROUTER:
        return rows * cols * FLOAT32_BYTES
    if kind in (Kind.NORMS, Kind.EMBEDDING):
        return rows * cols * form.stream_bytes
    if ".kv_b_proj." in tensor.name:
        return 0 if is_scale else _absorbed(architecture, architecture.num_heads // tp, form)
    if form.kernels == "reference":
        return 0 if is_scale else rows * cols * FLOAT32_BYTES
    if form.kernels == "native":
        block = architecture.scale_block if kind is not Kind.HEAD else None
        return 0 if is_scale else packed_bytes(rows, cols, block)
    if kind is Kind.HEAD:
        return rows * cols * form.stream_bytes
    return rows * cols * DTYPE_BYTES[tensor.dtype]


def packed_bytes(rows: int, cols: int, block: int | None) -> int:
    """Of one linear as the native kernels keep it: panels that cross no row of blocks, and float32 scales of
    each panel and block of inputs; bfloat16 without scales where `block` is None."""
    size = block or PLAIN_BLOCK
    num_panels = sum(-(-min(size, rows - row) // PANEL) for row in range(0, rows, size))
    depth = sum(-(-min(size, cols - col) // PANEL_DEPTH) * PANEL_DEPTH for col in range(0, cols, size))
    if block is None:
        return num_panels * depth * PANEL * BF16_BYTES
    return num_panels * (depth * PANEL + FLOAT32_BYTES * -(-cols // size))


def _absorbed(architecture: Architecture, num_heads: int, form: Form) -> int:
    """kv_b of `num_heads`: its key part for queries and for prompts, its value part."""
    a = architecture
    nope, value, latent = a.qk_nope_head_dim, a.v_head_dim, a.kv_lora_rank
    if form.kernels == "native":
        block = a.scale_block
        if block is not None and (nope % block or value % block):
            block = None  # a scale block is of two heads, or of keys and values: bfloat16
        keys = packed_bytes(latent, nope, block) + packed_bytes(nope, latent, block)
        return num_heads * (keys + packed_bytes(value, latent, block))
    item = FLOAT32_BYTES if form.kernels == "reference" else form.stream_bytes
    return num_heads * (nope + value) * latent * item


def _slice(tensor: Published, tp: int) -> tuple[int, int]:
    """Rows and columns that one of `tp` ranks holds; a vector is rows of one column."""
    rows, cols = (*tensor.shape, 1)[:2]
    if tensor.share is Share.ROWS:
        return rows // tp, cols
    return rows, cols // tp if tensor.share is Share.COLUMNS else cols
