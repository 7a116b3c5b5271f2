"""Every tensor a checkpoint of this family publishes: name, dtype, shape, and how ranks share it.

This list is what a loader expects, a writer writes and a shard plan divides (k2_facts section 3). 139,644
tensors for Kimi-K2-Instruct, with the 61 leftover `inv_freq`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from k2dist.config.architecture import Architecture
from k2dist.messages import Message

SCALE_SUFFIX = "_scale_inv"  # the name says inverse, the use is a multiply
DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}  # by safetensors' names


class Share(enum.Enum):
    """How the ranks of one lane, or of the world, share one tensor."""

    WHOLE = "whole"  # every rank of every lane
    ROWS = "rows"  # rows over the lane's tp ranks
    COLUMNS = "columns"  # columns over the lane's tp ranks
    EXPERT = "expert"  # whole, on each rank with a slot for this expert
    UNUSED = "unused"  # may be in the files; nobody reads it


class Published(Message, frozen=True, kw_only=True):
    """One tensor as the files hold it. `layer` and `expert` are None where it belongs to none."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    share: Share
    layer: int | None = None
    expert: int | None = None

    @property
    def num_bytes(self) -> int:
        num_elements = 1
        for size in self.shape:
            num_elements *= size
        return num_elements * DTYPE_BYTES[self.dtype]


def published_tensors(architecture: Architecture) -> Iterator[Published]:
    """All tensors that the model computes with, in the order of the layers; scales follow their weights."""
    embedding, norm, head = end_tensors(architecture)
    yield embedding
    for layer in range(architecture.num_layers):
        yield from layer_tensors(architecture, layer)
    yield norm
    yield head


def end_tensors(architecture: Architecture) -> tuple[Published, Published, Published]:
    """Of no layer: the embedding, the last norm and the head."""
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    return (
        Published(name="model.embed_tokens.weight", dtype="BF16", shape=(vocab, hidden), share=Share.ROWS),
        Published(name="model.norm.weight", dtype="BF16", shape=(hidden,), share=Share.WHOLE),
        Published(name="lm_head.weight", dtype="BF16", shape=(vocab, hidden), share=Share.ROWS),
    )


def leftover_tensors(architecture: Architecture) -> Iterator[Published]:
    """`rotary_emb.inv_freq` of every layer: in the published files of K2, never right to use (k2_facts 3)."""
    shape = (architecture.hidden_size // architecture.num_heads // 2,)
    for layer in range(architecture.num_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        yield Published(name=name, dtype="BF16", shape=shape, share=Share.UNUSED, layer=layer)


def layer_tensors(architecture: Architecture, layer: int) -> Iterator[Published]:
    """The tensors of one decoder layer."""
    prefix = f"model.layers.{layer}."
    hidden = architecture.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _norm(f"{prefix}{norm}.weight", hidden, layer)
    yield from _attention(architecture, f"{prefix}self_attn.", layer)
    if not architecture.is_moe_layer(layer):
        yield from _mlp(
            architecture, f"{prefix}mlp.", architecture.intermediate_size, layer, Share.ROWS, Share.COLUMNS
        )
        return
    yield Published(
        name=f"{prefix}mlp.gate.weight",
        dtype="BF16",
        shape=(architecture.num_experts, hidden),
        share=Share.WHOLE,
        layer=layer,
    )
    yield Published(
        name=f"{prefix}mlp.gate.e_score_correction_bias",
        dtype="F32",
        shape=(architecture.num_experts,),
        share=Share.WHOLE,
        layer=layer,
    )
    yield from _mlp(
        architecture,
        f"{prefix}mlp.shared_experts.",
        architecture.shared_width,
        layer,
        Share.WHOLE,
        Share.WHOLE,
    )
    for expert in range(architecture.num_experts):
        yield from _mlp(
            architecture,
            f"{prefix}mlp.experts.{expert}.",
            architecture.moe_intermediate_size,
            layer,
            Share.EXPERT,
            Share.EXPERT,
            expert,
        )


def _attention(architecture: Architecture, prefix: str, layer: int) -> Iterator[Published]:
    hidden, heads = architecture.hidden_size, architecture.num_heads
    q_rank, kv_rank = architecture.q_lora_rank, architecture.kv_lora_rank
    kv_rows = heads * (architecture.qk_nope_head_dim + architecture.v_head_dim)
    yield from _linear(architecture, f"{prefix}q_a_proj.weight", (q_rank, hidden), layer, Share.WHOLE)
    yield _norm(f"{prefix}q_a_layernorm.weight", q_rank, layer)
    q_rows = heads * architecture.qk_head_dim
    yield from _linear(architecture, f"{prefix}q_b_proj.weight", (q_rows, q_rank), layer, Share.ROWS)
    kv_a_shape = (architecture.latent_dim, hidden)
    yield from _linear(architecture, f"{prefix}kv_a_proj_with_mqa.weight", kv_a_shape, layer, Share.WHOLE)
    yield _norm(f"{prefix}kv_a_layernorm.weight", kv_rank, layer)
    yield from _linear(architecture, f"{prefix}kv_b_proj.weight", (kv_rows, kv_rank), layer, Share.ROWS)
    o_shape = (hidden, heads * architecture.v_head_dim)
    yield from _linear(architecture, f"{prefix}o_proj.weight", o_shape, layer, Share.COLUMNS)


def _mlp(
    architecture: Architecture,
    prefix: str,
    width: int,
    layer: int,
    up: Share,
    down: Share,
    expert: int | None = None,
) -> Iterator[Published]:
    hidden = architecture.hidden_size
    for name in ("gate_proj", "up_proj"):
        yield from _linear(architecture, f"{prefix}{name}.weight", (width, hidden), layer, up, expert)
    yield from _linear(architecture, f"{prefix}down_proj.weight", (hidden, width), layer, down, expert)


def _linear(
    architecture: Architecture,
    name: str,
    shape: tuple[int, int],
    layer: int,
    share: Share,
    expert: int | None = None,
) -> Iterator[Published]:
    """A weight, and its scales if the model is quantised: ceil(rows / 128) x ceil(columns / 128)."""
    block = architecture.scale_block
    dtype = "BF16" if block is None else "F8_E4M3"
    yield Published(name=name, dtype=dtype, shape=shape, share=share, layer=layer, expert=expert)
    if block is not None:
        yield Published(
            name=name + SCALE_SUFFIX,
            dtype="F32",
            shape=(-(-shape[0] // block), -(-shape[1] // block)),
            share=share,
            layer=layer,
            expert=expert,
        )


def _norm(name: str, width: int, layer: int) -> Published:
    return Published(name=name, dtype="BF16", shape=(width,), share=Share.WHOLE, layer=layer)
