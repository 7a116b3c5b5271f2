"""A rank's weights from its model directory to its device, one decoder layer after another.

The host never has more than one layer of what it does not keep: it is read to where the last one was, sent to
where it is used, and laid out there by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from k2kernels import Experts, KernelSet
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles
from k2dist.config import Architecture
from k2dist.engine.heap import release_freed_memory
from k2dist.engine.parts import read_parts
from k2dist.model.weights import LaneWeights, Layer, Weights, assemble_ends, assemble_layer
from k2dist.parallel import Layout, ShardPlan

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Places:
    """Where weights are used: experts may be elsewhere than the rest."""

    device: torch.device = CPU
    experts: torch.device = CPU

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor, by published name, where it belongs."""
        return {name: tensor.to(self._of(name)) for name, tensor in tensors.items()}

    def _of(self, name: str) -> torch.device:
        return self.experts if ".mlp.experts." in name else self.device


ON_CPU = Places()


def load_weights(
    model_dir: Path,
    plan: ShardPlan,
    architecture: Architecture,
    layout: Layout,
    kernels: KernelSet,
    places: Places,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """All that `plan` reads, laid out for `kernels`.

    `progress(bytes read, bytes of the part)` after each piece. Errors: CheckpointError.
    """
    place, tp = layout.place(plan.world_rank), layout.tp
    ends: LaneWeights | None = None
    layers: list[Layer] = []
    experts: list[Experts] = []
    with CheckpointFiles(model_dir) as files:
        files.check(plan)
        for number, _, tensors in read_parts(files, plan, architecture.num_layers, progress):
            if number is None:
                assert place.tp_rank is not None, "a rank without a lane reads no ends"
                ends = assemble_ends(places.put(tensors), architecture, place.tp_rank, tp, kernels)
                continue
            layer, layer_experts = assemble_layer(
                places.put(tensors), architecture, place, tp, kernels, number
            )
            layers += [] if layer is None else [layer]
            experts += [] if layer_experts is None else [layer_experts]
            release_freed_memory()
    return Weights(None if ends is None else replace(ends, layers=tuple(layers)), tuple(experts))
