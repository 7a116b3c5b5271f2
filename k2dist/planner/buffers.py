"""Bytes of a step's temporary tensors on one rank: estimates from above, of the largest layer of each sort.

The exchange is sized for `imbalance` times the rows that a rank would get if the router chose evenly, and
never for more than all rows of all lanes: more cannot come. A rank that gets more than planned takes it from
the reserve.

    own rows ──sent, once to each rank that holds any of their experts──> arrived rows ──> pairs of row, slot
    own rows x top_k outputs <───────────────────────────────────────────────────────── one output per pair
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from k2dist.config.architecture import Architecture
from k2dist.parallel.buckets import spare_places
from k2dist.planner.assumptions import ASSUMED
from k2dist.planner.terms import Terms
from k2dist.planner.work import FLOAT32_BYTES, SLOT_BYTES, row_bytes

STATIC_COPIES = 3  # of a static batch: the one that is read, and two that arrive in turn
INT_BYTES = 8


def exchange_bytes(
    architecture: Architecture, terms: Terms, *, own_rows: int, lanes: int, slots: int, all_slots: int
) -> int:
    """Of one MoE layer on a rank with `slots` of the layer's `all_slots`: rows and outputs, out and back."""
    a, stream_bytes = architecture, terms.form.stream_bytes
    rows = lanes * terms.step_tokens
    even_pairs = rows * a.top_k * slots / all_slots
    pairs = min(rows * min(a.top_k, slots), math.ceil(terms.imbalance * even_pairs))
    sent_bytes = row_bytes(a, stream_bytes) + SLOT_BYTES * a.top_k
    rows_out_and_in = (own_rows * a.top_k + min(rows, pairs)) * sent_bytes
    computed = pairs * 3 * a.moe_intermediate_size * stream_bytes  # gate, up, and their product
    outputs = 2 * (pairs + own_rows * a.top_k) * a.hidden_size * stream_bytes  # sorted, and as they travel
    return rows_out_and_in + computed + outputs


def activation_bytes(architecture: Architecture, terms: Terms, *, tp: int) -> int:
    """Of attention, the dense layers and the head on one rank of a lane: one of them at a time."""
    a, rows, stream_bytes = architecture, terms.step_tokens, terms.form.stream_bytes
    stream = 2 * rows * a.hidden_size * stream_bytes  # before and after a norm
    partial = rows * a.hidden_size * FLOAT32_BYTES  # sums on their way to other ranks
    compressed = a.q_lora_rank + a.latent_dim
    per_head = 2 * a.qk_head_dim + a.latent_dim + a.kv_lora_rank + a.v_head_dim
    attention = rows * (compressed + a.num_heads // tp * per_head) * stream_bytes + partial
    dense = rows * 3 * (a.intermediate_size // tp) * stream_bytes + partial
    logits = 2 * terms.max_samples * a.vocab_size * FLOAT32_BYTES  # this rank's slice, and all of them
    return stream + max(attention, dense if a.first_dense_layers else 0, logits)


def recorded_bytes(
    architecture: Architecture,
    terms: Terms,
    *,
    tp: int,
    lanes: int,
    slots: int | None,
    all_slots: int,
    has_lane: bool,
) -> int:
    """Of all graphs, and of the tensors of the largest recorded step: they are apart from other steps', and
    smaller graphs share them. On a rank of a lane also what a static batch is written to, and written in.

    `slots` None: the model has no MoE layer.
    """
    if not terms.recorded:
        return 0
    most = terms.recorded[0]
    step = replace(terms, step_tokens=most.rows, max_samples=0)  # logits are in no graph
    own_rows = -(-most.rows // tp) if has_lane else 0
    num_bytes = len(terms.recorded) * ASSUMED.graph_bytes
    if slots is not None:
        num_bytes += exchange_bytes(
            architecture, step, own_rows=own_rows, lanes=lanes, slots=slots, all_slots=all_slots
        )
    if has_lane:
        num_bytes += activation_bytes(architecture, step, tp=tp)
        num_bytes += STATIC_COPIES * INT_BYTES * most.num_ints
        num_bytes += most.rows * architecture.hidden_size * terms.form.stream_bytes
    return num_bytes


def spare_pages(terms: Terms) -> int:
    """Of a lane's cache, besides those of sequences: where rows of recorded steps that are none write."""
    if not terms.recorded:
        return 0
    return -(-spare_places(terms.recorded[0].rows) // terms.page_tokens)
