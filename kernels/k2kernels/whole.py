"""What whole half layers and layers work on: generated rows, and weights under the names of the mathematics.

A whole half layer gives the bits of the single steps that it stands for, in one call: on a CPU the 20 calls
of a small model's layer take longer than its weights take to be read. Attention as a whole is for a lane of
one rank and a step without prompts, experts as a whole for a world of one: no row has to travel in between.
Where both hold, all layers are one call.

    attention   q_a and kv_a | norms, rope | latents written | q_b, rope | absorb | attend | absorb | o
    moe         router | experts on rows as the wire rounds them | shared expert | weighted sum
    layers      in each: norm | attention | added to the stream | norm | MLP or moe | added; the last norm

T rows (may be 0), D hidden width, P pages of the longest table, E experts, e slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from k2kernels.router_topk import Rule


@dataclass(frozen=True, slots=True)
class GeneratedRows:
    """All int64. Row t is at `position_T[t]`, writes to cache place `place_T[t]`, and sees `length_T[t]` keys
    of the pages in its row of `page_TP`.
    """

    position_T: Tensor
    place_T: Tensor
    length_T: Tensor
    page_TP: Tensor
    page_tokens: int


class AttentionWeights(Protocol):
    """One layer's, linears as the set's own `prepare_*` laid them out."""

    @property
    def qkv_a(self) -> Any: ...
    @property
    def q_norm_Q(self) -> Tensor: ...  # noqa: N802
    @property
    def kv_norm_L(self) -> Tensor: ...  # noqa: N802
    @property
    def q_b(self) -> Any: ...
    @property
    def w_uk_hNL(self) -> Any: ...  # noqa: N802
    @property
    def w_uv_hLV(self) -> Any: ...  # noqa: N802
    @property
    def o(self) -> Any: ...


class RouterWeights(Protocol):
    """Float32."""

    @property
    def w_ED(self) -> Tensor: ...  # noqa: N802
    @property
    def bias_E(self) -> Tensor: ...  # noqa: N802


class MlpWeights(Protocol):
    """Of the shared expert, or of experts by slot."""

    @property
    def gate_up(self) -> Any: ...
    @property
    def down(self) -> Any: ...


class LayerWeights(Protocol):
    """`mlp`: MlpWeights of a dense layer; else it has the `router` and the `shared` expert."""

    @property
    def attention_norm_D(self) -> Tensor: ...  # noqa: N802
    @property
    def attention(self) -> AttentionWeights: ...
    @property
    def mlp_norm_D(self) -> Tensor: ...  # noqa: N802
    @property
    def mlp(self) -> Any: ...


class StackWeights(Protocol):
    """Layers one after another, those with experts last, and the norm after them."""

    @property
    def layers(self) -> Sequence[LayerWeights]: ...
    @property
    def norm_D(self) -> Tensor: ...  # noqa: N802


class Angles(Protocol):
    """Of all positions, float32."""

    @property
    def cos_PF(self) -> Tensor: ...  # noqa: N802
    @property
    def sin_PF(self) -> Tensor: ...  # noqa: N802


class Latents(Protocol):
    """`layers`: each layer's cache, [C, D]."""

    @property
    def layers(self) -> Sequence[Tensor]: ...
    @property
    def rope(self) -> Angles: ...


@dataclass(frozen=True, slots=True)
class Numbers:
    """`eps`: of the stream's norms, `inner_eps`: of attention's; `scale`: of its scores."""

    eps: float
    inner_eps: float
    scale: float
    rule: Rule


# Of the normed stream [T, D], weights, rows, one layer's cache, cosines and sines of all positions, the inner
# norms' epsilon and the scale of scores: [T, D], the rows' latents then being in the cache.
WholeAttention: TypeAlias = Callable[
    [Tensor, AttentionWeights, GeneratedRows, Tensor, Tensor, Tensor, float, float], Tensor
]
# Of the stream [T, D], which is used up, weights, the experts of each layer that has some and every expert's
# slot there, rows, caches and numbers: the last stream, normed, and the pairs of each slot, as of moe.
WholeLayers: TypeAlias = Callable[
    [Tensor, StackWeights, Sequence[MlpWeights], Sequence[Tensor], GeneratedRows, Latents, Numbers],
    tuple[Tensor, Sequence[Tensor]],
]
# Of the normed stream, router, rule, shared expert, experts, and every expert's slot (int32 [E]): [T, D],
# and how many pairs of row and expert each slot computed (int64 [e]).
WholeMoe: TypeAlias = Callable[
    [Tensor, RouterWeights, Rule, MlpWeights, MlpWeights, Tensor], tuple[Tensor, Tensor]
]
