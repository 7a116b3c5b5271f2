"""One rank's weights, laid out for its kernels: frozen tensors under the names of the mathematics.

`assemble` takes what the shard loader read, by published name and already cut for this rank, and uses every
entry once.

Lower case marks this rank's part: v = V / tp vocabulary rows, h = H / tp heads. D hidden width, E experts,
N unrotated, L latent and V value width of a head; V alone is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from k2kernels import Experts, KernelSet, Prepared, StoredWeight, absorb
from torch import Tensor

from k2dist.config import Architecture
from k2dist.errors import CheckpointError
from k2dist.parallel import RankPlace


@dataclass(frozen=True, slots=True)
class Mla:
    qkv_a: Prepared  # q_a and kv_a, one after the other: whole on every tp rank
    q_norm_Q: Tensor
    kv_norm_L: Tensor
    q_b: Prepared  # rows of this rank's heads
    w_uk_hNL: Prepared  # kv_b's key part: latent -> unrotated key, and absorbed the other way
    w_uv_hLV: Prepared  # kv_b's value part, transposed
    o: Prepared  # columns of this rank's heads: outputs are partial sums


@dataclass(frozen=True, slots=True)
class Mlp:
    """SwiGLU. A dense layer's is cut over tp: its outputs are partial sums. A shared expert's is whole."""

    gate_up: Prepared
    down: Prepared


@dataclass(frozen=True, slots=True)
class Router:
    w_ED: Tensor  # float32
    bias_E: Tensor  # float32


@dataclass(frozen=True, slots=True)
class Moe:
    router: Router
    shared: Mlp


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm_D: Tensor
    attention: Mla
    mlp_norm_D: Tensor
    mlp: Mlp | Moe


@dataclass(frozen=True, slots=True)
class LaneWeights:
    """What a rank of a lane holds besides experts."""

    embed_vD: Tensor
    first_token: int  # vocabulary row 0 of this rank's slice
    layers: tuple[Layer, ...]
    norm_D: Tensor
    head_vD: Prepared


@dataclass(frozen=True, slots=True)
class Weights:
    """`lane` is None on a rank that only holds experts. `experts[m]`: of MoE layer m, by slot."""

    lane: LaneWeights | None
    experts: tuple[Experts, ...]


def assemble(
    tensors: MutableMapping[str, Tensor],
    architecture: Architecture,
    place: RankPlace,
    tp: int,
    kernels: KernelSet,
) -> Weights:
    """Lay out `tensors` for `kernels`. `CheckpointError`: one is missing, extra or mis-shaped.

    `tensors` is emptied, so that each is freed once it is laid out: two copies of a shard are never there.
    """
    source = _Source(tensors, architecture.scale_block)
    tensors.clear()
    lane = None if place.tp_rank is None else _lane(source, architecture, place.tp_rank, tp, kernels)
    experts = tuple(
        _experts(source, architecture, architecture.first_dense_layers + moe_layer, slots, kernels)
        for moe_layer, slots in enumerate(place.experts)
    )
    source.check_used_up()
    return Weights(lane, experts)


def assemble_layer(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    place: RankPlace,
    tp: int,
    kernels: KernelSet,
    layer: int,
) -> tuple[Layer | None, Experts | None]:
    """What `assemble` makes of one decoder layer, from its tensors alone; None for what the rank lacks."""
    source = _Source(tensors, architecture.scale_block)
    lane_layer = None if place.tp_rank is None else _layer(source, architecture, layer, tp, kernels)
    experts = None
    if architecture.is_moe_layer(layer):
        slots = place.experts[layer - architecture.first_dense_layers]
        experts = _experts(source, architecture, layer, slots, kernels)
    source.check_used_up()
    return lane_layer, experts


def assemble_lane_layer(
    tensors: Mapping[str, Tensor], architecture: Architecture, tp: int, kernels: KernelSet, layer: int
) -> Layer:
    """What `assemble` makes of one decoder layer besides its experts, whose tensors are left alone."""
    experts = f"model.layers.{layer}.mlp.experts."
    mine = {name: tensor for name, tensor in tensors.items() if not name.startswith(experts)}
    source = _Source(mine, architecture.scale_block)
    lane_layer = _layer(source, architecture, layer, tp, kernels)
    source.check_used_up()
    return lane_layer


def assemble_slots(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    experts: Sequence[int],
    kernels: KernelSet,
    layer: int,
) -> Experts:
    """What `assemble` makes of slots that hold `experts`, of one layer."""
    wanted = tuple(expert_prefix(layer, expert) for expert in experts)
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(wanted)}
    source = _Source(mine, architecture.scale_block)
    slots = _experts(source, architecture, layer, tuple(experts), kernels)
    source.check_used_up()
    return slots


def expert_parts(
    tensors: Mapping[str, Tensor], architecture: Architecture, experts: Sequence[int], layer: int
) -> list[tuple[StoredWeight, StoredWeight, StoredWeight]]:
    """Gate, up and down of each, as a checkpoint holds them."""
    return _expert_parts(_Source(tensors, architecture.scale_block), architecture, experts, layer)


def expert_prefix(layer: int, expert: int) -> str:
    """Of the published names of one expert's tensors."""
    return f"model.layers.{layer}.mlp.experts.{expert}."


def assemble_ends(
    tensors: Mapping[str, Tensor], architecture: Architecture, tp_rank: int, tp: int, kernels: KernelSet
) -> LaneWeights:
    """What `assemble` makes of embedding, last norm and head; without layers."""
    source = _Source(tensors, architecture.scale_block)
    ends = _ends(source, architecture, tp_rank, tp, kernels, ())
    source.check_used_up()
    return ends


class _Source:
    """Tensors by name, each taken once."""

    def __init__(self, tensors: Mapping[str, Tensor], scale_block: int | None) -> None:
        self._left = dict(tensors)
        self._scale_block = scale_block

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._left:
            raise CheckpointError(f"{name}: needed by this rank, but not among the tensors read")
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: shape {list(tensor.shape)}, this rank needs {list(shape)}")
        return tensor

    def kept(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """In memory of its own: what was read lies among weights that nobody keeps."""
        return self.take(name, *shape).to(dtype, copy=True)

    def weight(self, name: str, rows: int, cols: int) -> StoredWeight:
        """A linear's weight with its scales, if this model has any."""
        block = self._scale_block
        w_NK = self.take(f"{name}.weight", rows, cols)
        if block is None:
            return StoredWeight(w_NK)
        return StoredWeight(
            w_NK, self.take(f"{name}.weight_scale_inv", -(-rows // block), -(-cols // block)), block
        )

    def check_used_up(self) -> None:
        if self._left:
            names = ", ".join(sorted(self._left)[:5])
            raise CheckpointError(f"{len(self._left)} tensors read for this rank have no use there: {names}")


def _lane(
    source: _Source, architecture: Architecture, tp_rank: int, tp: int, kernels: KernelSet
) -> LaneWeights:
    layers = tuple(
        _layer(source, architecture, layer, tp, kernels) for layer in range(architecture.num_layers)
    )
    return _ends(source, architecture, tp_rank, tp, kernels, layers)


def _ends(
    source: _Source,
    architecture: Architecture,
    tp_rank: int,
    tp: int,
    kernels: KernelSet,
    layers: tuple[Layer, ...],
) -> LaneWeights:
    hidden, rows = architecture.hidden_size, architecture.vocab_size // tp
    return LaneWeights(
        embed_vD=source.take("model.embed_tokens.weight", rows, hidden).to(kernels.dtype),
        first_token=rows * tp_rank,
        layers=layers,
        norm_D=source.take("model.norm.weight", hidden).to(kernels.dtype),
        head_vD=kernels.prepare_plain(source.take("lm_head.weight", rows, hidden)),
    )


def _layer(source: _Source, architecture: Architecture, layer: int, tp: int, kernels: KernelSet) -> Layer:
    prefix, hidden = f"model.layers.{layer}.", architecture.hidden_size
    mlp: Mlp | Moe
    if architecture.is_moe_layer(layer):
        mlp = _moe(source, architecture, f"{prefix}mlp.", kernels)
    else:
        mlp = _mlp(source, f"{prefix}mlp.", hidden, architecture.intermediate_size // tp, kernels)
    return Layer(
        attention_norm_D=source.kept(f"{prefix}input_layernorm.weight", kernels.dtype, hidden),
        attention=_mla(source, architecture, f"{prefix}self_attn.", tp, kernels),
        mlp_norm_D=source.kept(f"{prefix}post_attention_layernorm.weight", kernels.dtype, hidden),
        mlp=mlp,
    )


def _mla(source: _Source, architecture: Architecture, prefix: str, tp: int, kernels: KernelSet) -> Mla:
    hidden, heads = architecture.hidden_size, architecture.num_heads // tp
    q_rank, kv_rank = architecture.q_lora_rank, architecture.kv_lora_rank
    nope, value = architecture.qk_nope_head_dim, architecture.v_head_dim
    kv_b = source.weight(f"{prefix}kv_b_proj", heads * (nope + value), kv_rank)
    keys, values = absorb.heads_of(kv_b, heads, nope)
    return Mla(
        qkv_a=kernels.prepare_linear(
            [
                source.weight(f"{prefix}q_a_proj", q_rank, hidden),
                source.weight(f"{prefix}kv_a_proj_with_mqa", architecture.latent_dim, hidden),
            ]
        ),
        q_norm_Q=source.kept(f"{prefix}q_a_layernorm.weight", kernels.dtype, q_rank),
        kv_norm_L=source.kept(f"{prefix}kv_a_layernorm.weight", kernels.dtype, kv_rank),
        q_b=kernels.prepare_linear(
            [source.weight(f"{prefix}q_b_proj", heads * architecture.qk_head_dim, q_rank)]
        ),
        w_uk_hNL=kernels.prepare_keys(keys),
        w_uv_hLV=kernels.prepare_values(values),
        o=kernels.prepare_linear([source.weight(f"{prefix}o_proj", hidden, heads * value)]),
    )


def _mlp(source: _Source, prefix: str, hidden: int, width: int, kernels: KernelSet) -> Mlp:
    gate, up, down = _mlp_parts(source, prefix, hidden, width)
    return Mlp(kernels.prepare_linear([gate, up]), kernels.prepare_linear([down]))


def _mlp_parts(
    source: _Source, prefix: str, hidden: int, width: int
) -> tuple[StoredWeight, StoredWeight, StoredWeight]:
    return (
        source.weight(f"{prefix}gate_proj", width, hidden),
        source.weight(f"{prefix}up_proj", width, hidden),
        source.weight(f"{prefix}down_proj", hidden, width),
    )


def _moe(source: _Source, architecture: Architecture, prefix: str, kernels: KernelSet) -> Moe:
    num_experts, hidden = architecture.num_experts, architecture.hidden_size
    router = Router(
        w_ED=source.kept(f"{prefix}gate.weight", torch.float32, num_experts, hidden),
        bias_E=source.kept(f"{prefix}gate.e_score_correction_bias", torch.float32, num_experts),
    )
    shared = _mlp(source, f"{prefix}shared_experts.", hidden, architecture.shared_width, kernels)
    return Moe(router, shared)


def _experts(
    source: _Source, architecture: Architecture, layer: int, slots: tuple[int, ...], kernels: KernelSet
) -> Experts:
    hidden, width = architecture.hidden_size, architecture.moe_intermediate_size
    parts = _expert_parts(source, architecture, slots, layer)
    return Experts(
        gate_up=kernels.prepare_grouped([(gate, up) for gate, up, _ in parts], 2 * width),
        down=kernels.prepare_grouped([(down,) for _, _, down in parts], hidden),
    )


def _expert_parts(
    source: _Source, architecture: Architecture, experts: Sequence[int], layer: int
) -> list[tuple[StoredWeight, StoredWeight, StoredWeight]]:
    hidden, width = architecture.hidden_size, architecture.moe_intermediate_size
    return [_mlp_parts(source, expert_prefix(layer, expert), hidden, width) for expert in experts]
