"""Where a step is cut into parts: round calls that the model makes anyway, so that it knows of no clock.

    observer         after the embedding and after each half of a layer
    router_topk      the router ends with it
    dispatch         ends here; from then on experts, until combine begins
    combine          likewise

Legend: T rows, K experts of a row, W columns of a wire row, M pairs, D hidden width, e slots of this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from k2kernels import KernelSet, Rule
from torch import Tensor

from k2dist.comm import Dispatched, Exchange, RehearsalWorld, Ticket
from k2dist.config import Architecture
from k2dist.ids import SlotId, WorldRank
from k2dist.planner.work import SLOT_BYTES, Part, Traffic
from k2dist.rehearsal.parts import Stopwatch


class TimedExchange(Exchange):
    """An `Exchange` that cuts."""

    def __init__(
        self,
        world: RehearsalWorld,
        homes: Sequence[Sequence[tuple[WorldRank, SlotId]]],
        stopwatch: Stopwatch,
        device: torch.device,
    ) -> None:
        super().__init__(world, homes, device)
        self._world = world
        self._stopwatch = stopwatch
        # Counts stay on the device until somebody asks: looking at them would hold up the step.
        self._moved: list[tuple[Traffic, Tensor]] = []

    def dispatch(self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor) -> tuple[Dispatched, Ticket]:
        sent_before = self._world.num_rows_sent
        work, ticket = super().dispatch(moe_layer, rows_TW, expert_TK)
        self._stopwatch.cut(Part.DISPATCH)
        moved = Traffic(
            num_rows=len(rows_TW),
            rows_sent=self._world.num_rows_sent - sent_before,
            rows_arrived=len(work.rows_NW),
            row_bytes=rows_TW.shape[1] * rows_TW.element_size() + SLOT_BYTES * expert_TK.shape[1],
            pairs=len(work.row_M),
        )
        self._moved.append((moved, work.counts_per_slot))
        return work, ticket

    def combine(self, out_MD: Tensor, ticket: Ticket) -> Tensor:
        self._stopwatch.cut(Part.EXPERTS)
        out_TKD = super().combine(out_MD, ticket)
        self._stopwatch.cut(Part.COMBINE)
        return out_TKD

    def home_slots(self, moe_layer: int) -> Tensor | None:
        """Never: what is done in one call cannot be told apart."""
        return None

    def take_traffic(self) -> list[Traffic]:
        """Of each MoE layer since the last call, in order."""
        moved, self._moved = self._moved, []
        return [dataclasses.replace(one, slots_hit=int((counts_e > 0).sum())) for one, counts_e in moved]


def timed_kernels(kernels: KernelSet, stopwatch: Stopwatch) -> KernelSet:
    """The same kernels; the router's last one cuts."""

    def router_topk(logit_TE: Tensor, bias_E: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        chosen = kernels.router_topk(logit_TE, bias_E, rule)
        stopwatch.cut(Part.ROUTER)
        return chosen

    return dataclasses.replace(kernels, router_topk=router_topk)


class CuttingObserver:
    """What `decoder.hidden` takes as its observer."""

    def __init__(self, architecture: Architecture, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._ends = {"embedding": Part.EMBEDDING}
        for layer in range(architecture.num_layers):
            mlp = Part.SHARED if architecture.is_moe_layer(layer) else Part.DENSE
            self._ends |= {f"layers.{layer}.attention": Part.ATTENTION, f"layers.{layer}.mlp": mlp}

    def __call__(self, name: str, h_tD: Tensor) -> None:
        self._stopwatch.cut(self._ends[name])
