"""A rank's weights from its model directory to its device, one decoder layer after another.

The host never has more than one layer of what it does not keep: it is read, sent to where it is used, laid
out there by the kernels, and let go before the next one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from k2kernels import Experts, KernelSet
from msgspec.structs import replace as replace_plan
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles
from k2dist.config import Architecture
from k2dist.model.weights import Layer, Weights, assemble_ends, assemble_layer
from k2dist.parallel import Layout, ShardPlan
from k2dist.planner.fewer_layers import reads_by_layer

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

    `progress(bytes read, bytes of the layer)` after each piece. Errors: CheckpointError.
    """
    place, tp = layout.place(plan.world_rank), layout.tp
    reads = reads_by_layer(plan.reads)
    layers: list[Layer] = []
    experts: list[Experts] = []
    with CheckpointFiles(model_dir) as files:
        files.check(plan)

        def read(part: int | None) -> dict[str, Tensor]:
            wanted = replace_plan(plan, reads=tuple(reads.get(part, ())), skips=())
            return places.put(files.read_all(wanted, progress))

        for number in range(architecture.num_layers):
            layer, layer_experts = assemble_layer(read(number), architecture, place, tp, kernels, number)
            layers += [] if layer is None else [layer]
            experts += [] if layer_experts is None else [layer_experts]
        if place.tp_rank is None:
            return Weights(None, tuple(experts))
        ends = assemble_ends(read(None), architecture, place.tp_rank, tp, kernels)
    return Weights(replace(ends, layers=tuple(layers)), tuple(experts))
