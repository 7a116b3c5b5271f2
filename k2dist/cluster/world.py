"""What a cluster is to become, settled before anything starts: config, model and a layout that fits both."""

from __future__ import annotations

from pathlib import Path

from k2dist.config import read_architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.ids import Generation, LaneId, WorldRank
from k2dist.messages import Message
from k2dist.parallel import Layout, configured_layout


class World(Message, frozen=True, kw_only=True):
    """The plan of one cluster; the same on every process of it. `model_dir` is absolute."""

    config: ClusterConfig
    model_dir: str
    layout: Layout

    @property
    def num_cpus(self) -> float:
        """What the ranks take together, as Ray counts it."""
        return self.layout.world_size * self.config.ranks.rank_cpus

    @property
    def num_gpus(self) -> float:
        return self.layout.world_size * self.config.ranks.rank_gpus

    def first_ranks(self) -> tuple[WorldRank, ...]:
        """The rank that schedules each lane, by lane."""
        return tuple(self.layout.members(LaneId(lane))[0] for lane in range(self.layout.num_lanes))


class Rendezvous(Message, frozen=True, kw_only=True):
    """Where the ranks of one generation meet. A store never serves two generations."""

    generation: Generation
    host: str
    port: int


def plan_world(config: ClusterConfig, model_dir: Path) -> World:
    """Lay `config` out over the model in `model_dir`.

    Errors: CheckpointError (no such model), ConfigError (its config.json), LayoutError (it cannot be cut so).
    """
    model_dir = model_dir.absolute()
    layout = configured_layout(read_architecture(model_dir), config.parallel)
    return World(config=config, model_dir=str(model_dir), layout=layout)
