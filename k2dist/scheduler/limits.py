"""What one lane may take on at a time."""

from __future__ import annotations

import math

from msgspec import structs

from k2dist.config.cluster import ClusterConfig
from k2dist.errors import ConfigError
from k2dist.messages import Message


class Limits(Message, frozen=True, kw_only=True):
    """Bounds of one lane's scheduler; all counts are per lane.

    Every running sequence can decode in every step, so `step_tokens >= max_running` must hold.
    """

    step_tokens: int = 2048  # rows of one step; more: prompts finish sooner, each token comes later
    chunk_tokens: int = 512  # prompt rows of one sequence in one step; less: fairer among prompts
    max_running: int = 256  # sequences that hold pages; more: higher throughput, slower each
    max_waiting: int = 1024  # sequences that wait for a place; beyond it `add` refuses
    # Prompts are computed in every so many steps, on all lanes in the same ones; more: tokens come sooner
    # beside prompts, and prompts take longer.
    prefill_every: int = 1
    # Who has waited so long is one priority higher; more: priorities mean more, and low ones wait longer.
    ageing_s: float = 60.0
    # Let a prompt find pages that were generated: a next turn starts sooner, and its bits may differ from
    # those of a prompt that was computed as one.
    reuse_generated: bool = False

    @classmethod
    def of(cls, config: ClusterConfig) -> Limits:
        """What a cluster's file says of each lane."""
        return cls(**structs.asdict(config.scheduler), reuse_generated=config.cache.reuse_generated)

    def __post_init__(self) -> None:
        for name in ("step_tokens", "chunk_tokens", "max_running", "max_waiting", "prefill_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scheduler.{name}={getattr(self, name)}: must be at least 1")
        if self.step_tokens < self.max_running:
            raise ConfigError(
                f"scheduler.step_tokens={self.step_tokens}: less than max_running={self.max_running}, so "
                f"that not every running sequence could decode in a step; raise the one or lower the other"
            )
        if self.chunk_tokens > self.step_tokens:
            raise ConfigError(
                f"scheduler.chunk_tokens={self.chunk_tokens}: more than step_tokens={self.step_tokens}; "
                f"a chunk has to fit into a step"
            )
        if not 0 < self.ageing_s < math.inf:
            raise ConfigError(f"scheduler.ageing_s={self.ageing_s}: use a number of seconds, such as 60")
