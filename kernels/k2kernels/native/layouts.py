"""Weights laid out for the native kernels, each kind as the kernels that take it want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from k2kernels.fp8_gemm import StoredWeight
from k2kernels.native.caller import Caller
from k2kernels.native.packed import PackedLinear, holds_slots, pack_slots


@dataclass(frozen=True, slots=True)
class PackedKeys:
    """kv_b's key part both ways: queries into the latent space, latents to keys."""

    absorbing: PackedLinear
    decompressing: PackedLinear


@dataclass(frozen=True, slots=True)
class Layouts:
    call: Caller

    def prepare_linear(self, parts: Sequence[StoredWeight]) -> PackedLinear:
        return pack_slots([parts], sum(len(part.w_NK) for part in parts), self.call.num_threads)

    def prepare_plain(self, w_NK: Tensor) -> PackedLinear:
        return pack_slots([[StoredWeight(w_NK)]], len(w_NK), self.call.num_threads)

    def prepare_grouped(self, slots: Sequence[Sequence[StoredWeight]], num_outputs: int) -> PackedLinear:
        return pack_slots(slots, num_outputs, self.call.num_threads)

    def holds_grouped(self, w: PackedLinear, slots: Sequence[Sequence[StoredWeight]]) -> bool:
        return holds_slots(w, slots, self.call.num_threads)

    def prepare_keys(self, heads: Sequence[StoredWeight]) -> PackedKeys:
        return PackedKeys(self.prepare_values([_turned(head) for head in heads]), self.prepare_values(heads))

    def prepare_values(self, heads: Sequence[StoredWeight]) -> PackedLinear:
        """A slot per head, for activations that are not quantised."""
        slots = [[_kept(head)] for head in heads]
        num_outputs = len(heads[0].w_NK)
        return pack_slots(slots, num_outputs, self.call.num_threads, are_acts_quantised=False)


def _kept(w: StoredWeight) -> StoredWeight:
    """Float8 as it is, all else in bfloat16."""
    return w if w.block is not None else StoredWeight(w.w_NK.bfloat16())


def _turned(w: StoredWeight) -> StoredWeight:
    return StoredWeight(w.w_NK.T, None if w.scale_nk is None else w.scale_nk.T, w.block)
