"""A rank's self-test, between its load and its first step: no rank is ready before it passes.

    read again  ── its bytes are those of the manifest, if `k2dist verify` has written one
      └ laid out again ── what lies in this rank's slots has the same bits
      └ in float64 ── the kernels compute the same on a short sequence, in one layer of each kind and the last

Without a manifest only what differs between two reads is found. Takes as long as loading does; memory in use
beyond the weights is one decoder layer as stored (or embedding and head), and some of it as laid out. No
other rank takes part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from k2kernels import Experts, KernelSet
from msgspec.structs import replace
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles
from k2dist.checkpoint.manifest import ManifestChecker, find_checker
from k2dist.config import Architecture
from k2dist.engine.heap import release_freed_memory
from k2dist.engine.kernel_check import KernelCheck, layers_to_check
from k2dist.engine.load import ON_CPU, Places
from k2dist.engine.parts import read_parts
from k2dist.engine.resident import SecondLook
from k2dist.errors import CheckpointError, FaultyRankError, K2Error
from k2dist.messages import Message
from k2dist.model.weights import Weights, assemble_ends, assemble_lane_layer, assemble_slots, expert_parts
from k2dist.parallel import Layout, RankPlace, ShardPlan, shard_plan

NUM_FAULTS_SHOWN = 5
_HEAD = ("model.norm.weight", "lm_head.weight")
NUM_HASH_THREADS = 4
SLOTS_AT_ONCE = 8  # laid out again, where the kernels cannot compare


class SelfTestReport(Message, frozen=True, kw_only=True):
    """A self-test that passed. `worst_error`: of the kernels against float64, a row's, as a share."""

    num_tensors: int
    num_bytes: int
    has_manifest: bool
    worst_error: float
    test_s: float


def self_test(
    model_dir: Path,
    architecture: Architecture,
    layout: Layout,
    world_rank: int,
    weights: Weights,
    kernels: KernelSet,
    *,
    page_tokens: int,
    places: Places = ON_CPU,
    progress: Callable[[int, int], None] | None = None,
) -> SelfTestReport:
    """Test what `world_rank` holds and computes; returns if all is right.

    `progress(bytes tested, bytes in all)` after each decoder layer.

    Errors: CheckpointError if files are not those of the manifest, FaultyRankError if memory or kernels are
    at fault. Both name the tensor or the half layer, of the first decoder layer where something is wrong.
    """
    started_s, num_bytes_tested = time.monotonic(), 0
    checker = find_checker(model_dir, architecture)
    plan = shard_plan(architecture, layout, world_rank)
    rank = f"world rank {world_rank}"
    test = _SelfTest(
        architecture, layout.place(world_rank), layout.tp, weights, kernels, page_tokens, places.device
    )
    with CheckpointFiles(model_dir) as files, torch.inference_mode():
        for layer, part, tensors in read_parts(files, plan, architecture.num_layers):
            if checker is not None:
                _raise(CheckpointError, f"{rank}: {model_dir}", _file_faults(checker, part, tensors))
            _raise(FaultyRankError, rank, test.faults(layer, places.put(tensors)))
            num_bytes_tested += part.num_bytes
            if progress is not None:
                progress(num_bytes_tested, plan.num_bytes)
            release_freed_memory()
        head = tuple(read for read in plan.reads if read.name in _HEAD)
        if head:  # the stream has come there: read once more, not kept till then
            tensors = files.read_all(replace(plan, reads=head, skips=()))
            _raise(FaultyRankError, rank, test.head_faults(places.put(tensors)))
    return SelfTestReport(
        num_tensors=len(plan.reads),
        num_bytes=plan.num_bytes,
        has_manifest=checker is not None,
        worst_error=test.worst_error,
        test_s=time.monotonic() - started_s,
    )


class _SelfTest:
    """One rank under test: first its ends (layer None), where it has a lane, then its layers in order."""

    def __init__(
        self,
        architecture: Architecture,
        place: RankPlace,
        tp: int,
        weights: Weights,
        kernels: KernelSet,
        page_tokens: int,
        device: torch.device,
    ) -> None:
        self._architecture = architecture
        self._place = place
        self._tp = tp
        self._weights = weights
        self._kernels = kernels
        self._check = KernelCheck(architecture, place, tp, page_tokens, kernels, device)
        self._check.begin(weights.lane)
        self._layers_to_check = layers_to_check(architecture)

    @property
    def worst_error(self) -> float:
        return self._check.worst

    def faults(self, layer: int | None, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """Of memory, and only where it has none of the kernels."""
        listed = list(self._memory_faults(layer, tensors))
        yield from listed or self._kernel_faults(layer, tensors)

    def _memory_faults(self, layer: int | None, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        look = SecondLook(tensors, self._architecture.scale_block)
        if layer is None:
            yield from self._end_faults(look, tensors)
            return
        architecture, kernels, lane = self._architecture, self._kernels, self._weights.lane
        if lane is not None:
            again = assemble_lane_layer(tensors, architecture, self._tp, kernels, layer)
            yield from look.layer(lane.layers[layer], again, layer)
        if architecture.is_moe_layer(layer):
            yield from self._expert_faults(look, layer, tensors)

    def _expert_faults(self, look: SecondLook, layer: int, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """All of a layer are laid out again only where one of them differs, to say whose it is."""
        moe_layer = layer - self._architecture.first_dense_layers
        resident, slots = self._weights.experts[moe_layer], self._place.experts[moe_layer]
        if not self._are_held(look, resident, slots, layer, tensors):
            every = assemble_slots(tensors, self._architecture, slots, self._kernels, layer)
            yield from look.experts(resident, every, layer, slots)

    def _are_held(
        self,
        look: SecondLook,
        resident: Experts,
        slots: Sequence[int],
        layer: int,
        tensors: Mapping[str, Tensor],
    ) -> bool:
        """By the kernels where they can tell; else a few slots at a time are laid out again."""
        architecture, kernels = self._architecture, self._kernels
        if kernels.holds_grouped is not None:
            parts = expert_parts(tensors, architecture, slots, layer)
            return kernels.holds_grouped(
                resident.gate_up, [(gate, up) for gate, up, _ in parts]
            ) and kernels.holds_grouped(resident.down, [(down,) for _, _, down in parts])
        for first in range(0, len(slots), SLOTS_AT_ONCE):
            some = slots[first : first + SLOTS_AT_ONCE]
            again = assemble_slots(tensors, architecture, some, kernels, layer)
            if not look.are_same(resident, again, first, len(some)):
                return False
        return True

    def _kernel_faults(self, layer: int | None, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        if layer is None or layer not in self._layers_to_check:
            return
        release_freed_memory()  # what was laid out again
        lane, experts = self._weights.lane, None
        if self._architecture.is_moe_layer(layer):
            experts = self._weights.experts[layer - self._architecture.first_dense_layers]
        yield from self._check.layer(layer, None if lane is None else lane.layers[layer], experts, tensors)

    def head_faults(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        lane = self._weights.lane
        assert lane is not None, "a rank without a lane has no head"
        yield from self._check.head(lane, tensors)

    def _end_faults(self, look: SecondLook, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        lane, tp_rank = self._weights.lane, self._place.tp_rank
        assert lane is not None, "a rank without a lane reads no ends"
        assert tp_rank is not None
        again = assemble_ends(tensors, self._architecture, tp_rank, self._tp, self._kernels)
        yield from look.ends(lane, again)


def _file_faults(checker: ManifestChecker, part: ShardPlan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Hashing leaves Python's lock, so threads share it."""
    with ThreadPoolExecutor(NUM_HASH_THREADS, thread_name_prefix="hash") as pool:
        for faults in pool.map(lambda read: list(checker.faults(read, tensors[read.name])), part.reads):
            yield from faults


def _raise(kind: type[K2Error], whose: str, faults: Iterator[str]) -> None:
    """An error that lists the first of `faults`; none if there is none."""
    listed = list(faults)
    if listed:
        rest = len(listed) - NUM_FAULTS_SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise kind(f"{whose}: self-test: " + "; ".join(listed[:NUM_FAULTS_SHOWN]) + more)
