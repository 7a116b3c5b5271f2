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

    def prepare_keys(self, w_HNL: Tensor) -> PackedKeys:
        return PackedKeys(self.prepare_heads(w_HNL), self.prepare_heads(w_HNL.transpose(1, 2)))

    def prepare_heads(self, w_HKN: Tensor) -> PackedLinear:
        """For `absorb`: a slot per head, whose outputs are w's last axis."""
        return pack_slots([[StoredWeight(w_KN.T)] for w_KN in w_HKN], w_HKN.shape[2], self.call.num_threads)
