"""All that makes one rank what it is, and what follows from it before anything is loaded."""

from __future__ import annotations

from typing import Literal

import torch
from k2kernels import KernelSet

from k2dist.comm import CapacityRule
from k2dist.config import Architecture
from k2dist.engine.form import FormRule
from k2dist.engine.kernels import select_kernels, with_cpu_experts
from k2dist.engine.load import CPU, Places
from k2dist.errors import ConfigError
from k2dist.messages import Message
from k2dist.model.latent_cache import LatentCache
from k2dist.parallel import Layout
from k2dist.parallel.buckets import spare_places
from k2dist.scheduler import Limits


class RankSpec(Message, frozen=True, kw_only=True):
    """All that makes one rank what it is. `num_pages` pages of `page_tokens` tokens for its lane."""

    model_dir: str
    layout: Layout
    world_rank: int
    page_tokens: int
    num_pages: int
    limits: Limits
    kernels: str = "auto"
    dtype: str = "bfloat16"  # of the residual stream; float32: nothing but the weights is quantised
    # Of the exchange in steps without prompts (config.cluster.ExchangeConfig); None: exact in all.
    capacity_factor: float | None = None
    retain_s: float = 60.0  # how long a lane remembers a request after its end
    device: Literal["cpu", "cuda"] = "cpu"  # of weights, cache and steps; cuda: this process's first
    experts_device: Literal["auto", "cpu"] = "auto"  # of experts' weights; auto: with the rest
    # Steps of generated rows alone are recorded as CUDA graphs and replayed; twin: as on a device, on any.
    graphs: Literal["auto", "off", "twin"] = "auto"
    record_s: float = (
        300.0  # for recording, in each generation; sizes that are not recorded by then run eagerly
    )
    # Rows of a step from which it is computed in two halves, one's exchange behind the other's attention
    # (where exchanges are exact). None: never.
    split_tokens: int | None = None

    @property
    def places(self) -> Places:
        """Errors: ConfigError where there is no such device."""
        device = CPU
        if self.device == "cuda":
            if not torch.cuda.is_available():
                raise ConfigError(
                    "device='cuda': torch finds no CUDA device here; use 'cpu', or ranks.rank_gpus: 0"
                )
            device = torch.device("cuda", 0)
        return Places(device, CPU if self.experts_device == "cpu" else device)

    def select_kernels(self) -> KernelSet:
        """Errors: ConfigError."""
        kernels = select_kernels(self.kernels, self.dtype, self.places.device)
        return with_cpu_experts(kernels, self.dtype) if self.experts_device == "cpu" else kernels

    def form_rule(self, architecture: Architecture) -> FormRule:
        """The same on all ranks."""
        factor = self.capacity_factor
        return FormRule.of(
            tp=self.layout.tp,
            world_size=self.layout.world_size,
            padding=None if factor is None else CapacityRule.of(architecture, self.layout, factor),
            most_rows=self.limits.max_running,
            most_pages=min(self.num_pages, -(-architecture.max_positions // self.page_tokens)),
            split_tokens=self.split_tokens,
        )

    @property
    def is_recording(self) -> bool:
        """Whether it wants to record steps; if its groups cannot be recorded, it does not."""
        return self.graphs == "twin" or (self.graphs == "auto" and self.device == "cuda")

    def allocate_cache(
        self, architecture: Architecture, kernels: KernelSet, rule: FormRule
    ) -> LatentCache | None:
        """None on a rank without a lane."""
        if self.layout.place(self.world_rank).lane is None:
            return None
        return LatentCache.allocate(
            architecture,
            self.num_pages,
            self.page_tokens,
            kernels,
            self.places.device,
            num_spare=spare_places(self.limits.max_running) if self.is_recording and rule.buckets else 0,
        )
