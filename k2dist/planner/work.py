"""What one rank must move and compute in a step, part by part: bytes and operations, whatever the device.

Each product and each attention moves its bytes once and does its operations; the exchange's parts read and
write their rows once. Norms, rotations, quantising and SwiGLU count nothing: they can be done on the way.
Weights count as published (float8), whatever the kernels keep; of experts only those that have rows. A test
holds these sums to what `k2kernels` says of its ops.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from k2dist.config.architecture import Architecture

SLOT_BYTES = 4  # int32, top_k of them beside each row on its way (comm.exchange)
FLOAT32_BYTES = 4  # scales of quantised rows, sums, logits, router weights
BF16_BYTES = 2


class Part(enum.StrEnum):
    """What a moment of a step is spent on. Norms, residuals and quantising belong to what needs them."""

    HOST = "host"  # plan to batch, and the tokens' bookkeeping
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    ROUTER = "router"
    DISPATCH = "dispatch"  # packing own rows, sorting what arrived
    EXPERTS = "experts"
    COMBINE = "combine"  # into the order of travel, and home into the router's order
    SHARED = "shared expert"  # with the weighted sum
    DENSE = "dense MLP"
    HEAD = "head"
    SAMPLE = "sample"


class Sort(enum.Enum):
    """By what a device's rates differ."""

    FLOAT8 = enum.auto()  # products of float8 by float8
    GROUPED = enum.auto()  # likewise, of many experts at once
    PLAIN = enum.auto()  # products of bfloat16
    DECODE = enum.auto()  # attention of decoding rows over cached latents
    PROMPT = enum.auto()  # attention of prompt rows
    MOVE = enum.auto()  # read once, written once: `num_bytes` counts both


class Work(NamedTuple):
    """One kernel's, `times` in a step."""

    part: Part
    sort: Sort
    num_bytes: float
    num_flops: float
    times: int = 1


@dataclass(frozen=True, slots=True)
class LaneWork:
    """A step of one rank of a lane. All zero on a rank without a lane."""

    num_rows: int  # of the lane
    own_rows: int  # of this rank's share
    decode_rows: int
    num_keys: float  # that a decode row sees, on average
    prompt_rows: int
    prompts: int = 1  # in which they are, one part of each
    prompt_start: float = 0.0  # keys before the first row of each, on average

    @property
    def num_samples(self) -> int:
        return self.decode_rows + min(self.prompt_rows, self.prompts)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one MoE layer's exchange moved in one step, as this rank sees it; its own rows included."""

    num_rows: float  # this rank's own
    rows_sent: float  # copies for other ranks
    rows_arrived: float  # from all ranks
    row_bytes: int  # on the wire
    pairs: float  # of row and slot: what this rank's experts computed
    slots_hit: float = 0  # with at least one pair


def lane_work(a: Architecture, tp: int, work: LaneWork) -> Iterator[Work]:
    """Of all that a lane's rank does besides experts, in all layers."""
    if not work.num_rows:
        return
    for one in _attention(a, tp, work):
        yield one._replace(times=a.num_layers)
    for one in _mlp(a, Part.DENSE, work.num_rows, a.intermediate_size // tp):
        yield one._replace(times=a.first_dense_layers)
    samples, vocab = work.num_samples, a.vocab_size // tp
    yield _plain(Part.HEAD, samples, vocab, a.hidden_size, FLOAT32_BYTES)
    yield Work(Part.SAMPLE, Sort.PLAIN, samples * vocab * FLOAT32_BYTES, 0)


def expert_work(a: Architecture, return_bytes: int, traffic: Traffic) -> Iterator[Work]:
    """Of one MoE layer. `return_bytes`: of one element of an expert's output. A kernel set's weights of a
    slot without a row are not read."""
    t, width, hidden = traffic, a.moe_intermediate_size, a.hidden_size
    yield _moved(Part.DISPATCH, (t.rows_sent + t.rows_arrived) * t.row_bytes)
    if t.pairs:
        for outputs, inputs in ((2 * width, hidden), (hidden, width)):
            num_bytes = t.slots_hit * outputs * inputs + t.pairs * (inputs + 2 * outputs)
            is_plain = a.scale_block is None  # two bytes for each one of float8
            flops = 2.0 * t.pairs * outputs * inputs
            sort = Sort.PLAIN if is_plain else Sort.GROUPED
            yield Work(Part.EXPERTS, sort, num_bytes * (1 + is_plain), flops)
    yield _moved(Part.COMBINE, (t.pairs + t.num_rows * a.top_k) * hidden * return_bytes)
    if t.num_rows:
        moved = BF16_BYTES * t.num_rows * hidden
        moved += FLOAT32_BYTES * a.num_experts * (hidden + t.num_rows)
        yield Work(Part.ROUTER, Sort.PLAIN, moved, 2.0 * t.num_rows * a.num_experts * hidden)
        yield from _mlp(a, Part.SHARED, t.num_rows, a.shared_width)


def row_bytes(a: Architecture, stream_bytes: int = BF16_BYTES) -> int:
    """Of one row on its way to experts, without slots: quantised where their weights are (k2kernels.wire)."""
    hidden, block = a.hidden_size, a.scale_block
    return hidden * stream_bytes if block is None else hidden + FLOAT32_BYTES * -(-hidden // block)


def _attention(a: Architecture, tp: int, work: LaneWork) -> Iterator[Work]:
    """Of one layer."""
    heads, rows, decoded = a.num_heads // tp, work.num_rows, work.decode_rows
    yield _linear(a, Part.ATTENTION, work.own_rows, a.q_lora_rank + a.latent_dim, a.hidden_size)
    yield _linear(a, Part.ATTENTION, rows, heads * a.qk_head_dim, a.q_lora_rank)
    yield _linear(a, Part.ATTENTION, rows, a.hidden_size, heads * a.v_head_dim)
    if decoded:
        for inner, outer in ((a.qk_nope_head_dim, a.kv_lora_rank), (a.kv_lora_rank, a.v_head_dim)):
            moved = 2.0 * heads * (inner * outer + decoded * (inner + outer))  # kv_b too is bfloat16 there
            yield Work(Part.ATTENTION, Sort.PLAIN, moved, 2.0 * decoded * heads * inner * outer)
        both = a.latent_dim + a.kv_lora_rank
        moved = 2.0 * decoded * (work.num_keys * a.latent_dim + heads * both)
        yield Work(Part.ATTENTION, Sort.DECODE, moved, 2.0 * decoded * heads * work.num_keys * both)
    if work.prompt_rows:
        yield _prompt_attention(a, heads, work)


def _prompt_attention(a: Architecture, heads: int, work: LaneWork) -> Work:
    """Each latent is decompressed once; the causal half of the last rows' scores is not computed."""
    count = work.prompts
    rows, start = work.prompt_rows / count, work.prompt_start
    keys, scored = start + rows, rows * start + rows * (rows + 1) / 2
    decompressed = a.qk_nope_head_dim + a.v_head_dim
    head_width = a.qk_head_dim + a.v_head_dim
    flops = 2.0 * heads * (keys * a.kv_lora_rank * decompressed + scored * head_width)
    moved = keys * a.latent_dim + rows * heads * head_width + heads * a.kv_lora_rank * decompressed
    return Work(Part.ATTENTION, Sort.PROMPT, 2.0 * moved * count, flops * count)


def _mlp(a: Architecture, part: Part, rows: float, width: int) -> Iterator[Work]:
    yield _linear(a, part, rows, 2 * width, a.hidden_size)
    yield _linear(a, part, rows, a.hidden_size, width)


def _linear(a: Architecture, part: Part, rows: float, outputs: int, inputs: int) -> Work:
    if rows == 0:
        return Work(part, Sort.FLOAT8, 0, 0)
    if a.scale_block is None:
        return _plain(part, rows, outputs, inputs, FLOAT32_BYTES)
    blocks = -(-inputs // a.scale_block)
    moved = outputs * inputs + rows * inputs + BF16_BYTES * rows * outputs
    moved += FLOAT32_BYTES * blocks * (-(-outputs // a.scale_block) + rows)
    return Work(part, Sort.FLOAT8, moved, 2.0 * rows * outputs * inputs)


def _plain(part: Part, rows: float, outputs: int, inputs: int, out_bytes: int) -> Work:
    moved = BF16_BYTES * (outputs + rows) * inputs + out_bytes * rows * outputs
    return Work(part, Sort.PLAIN, moved, 2.0 * rows * outputs * inputs)


def _moved(part: Part, num_bytes: float) -> Work:
    return Work(part, Sort.MOVE, 2 * num_bytes, 0)
