"""What it costs that a rank is lost: for how long nobody steps, and when its lane is back."""

from __future__ import annotations

from k2dist.config.architecture import Architecture
from k2dist.errors import UsageError
from k2dist.messages import Message
from k2dist.parallel import Layout
from k2dist.planner.rank_memory import RankMemory
from k2dist.planner.site import Site


class Loss(Message, frozen=True, kw_only=True):
    """At `at_s` by the virtual clock. `lane_back_s`: after that, until its lane takes requests again.

    `needs_reload`: some weight was in its memory alone, so all wait for the new rank to have read it; else
    the others go on without it meanwhile.
    """

    world_rank: int
    lane: int | None
    at_s: float
    pause_s: float
    lane_back_s: float
    needs_reload: bool


def loss_of(
    architecture: Architecture,
    layout: Layout,
    rank: RankMemory,
    site: Site,
    at_s: float,
    recapture_s: float,
) -> Loss:
    """Of `rank`, replaced on a node that is there. Survivors keep weights and pages (design, section 9)."""
    assumed = site.assumed
    joining_s = assumed.join_s + recapture_s
    loading_s = rank.read_bytes / assumed.disk_rate + rank.read_bytes / assumed.layout_rate
    replaced_s = assumed.restart_s + loading_s + rank.read_bytes / assumed.test_rate
    needs_reload = not _is_held_elsewhere(architecture, layout, rank.world_rank)
    back_s = assumed.detect_s + replaced_s + joining_s
    return Loss(
        world_rank=rank.world_rank,
        lane=rank.lane,
        at_s=at_s,
        pause_s=back_s if needs_reload else assumed.detect_s + joining_s,
        lane_back_s=back_s,
        needs_reload=needs_reload,
    )


def read_loss(text: str, world_size: int) -> tuple[int, float]:
    """Rank and seconds of `RANK@SECONDS`. Raises `UsageError`."""
    rank, at, seconds = text.partition("@")
    try:
        world_rank, at_s = int(rank), float(seconds)
    except ValueError:
        world_rank, at_s = -1, -1.0
    if not at or not 0 <= world_rank < world_size or at_s < 0:
        raise UsageError(f"--lose {text}: use RANK@SECONDS, with a rank from 0 to {world_size - 1}")
    return world_rank, at_s


def _is_held_elsewhere(architecture: Architecture, layout: Layout, world_rank: int) -> bool:
    """Every expert of the rank lies on another one too: then whoever is left can compute every row."""
    others = [place for place in layout.ranks if place.world_rank != world_rank]
    lost = layout.ranks[world_rank].experts
    return all(
        set(lost[layer]) <= {expert for place in others for expert in place.experts[layer]}
        for layer in range(architecture.num_moe_layers)
    )
