"""What can happen to a world of ranks, and what its supervisor can do about it: plain values.

A rank's process is named by (world_rank, incarnation). Every `StartRank` of a rank makes a new incarnation,
so that news of an older process, however late, cannot be taken for news of the one that replaced it.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2dist.ids import Generation, WorldRank


@dataclass(frozen=True, slots=True)
class OfProcess:
    """News of one process of a rank, or work for it."""

    world_rank: WorldRank
    incarnation: int


# -- events: facts that the shell reports ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Build the world."""


@dataclass(frozen=True, slots=True)
class Placed:
    """The placement group has all its bundles."""


@dataclass(frozen=True, slots=True)
class PlacementFailed:
    """The cluster cannot hold the layout; `error` gives the arithmetic."""

    error: str


class Started(OfProcess):
    """The rank's process answers."""


class Loaded(OfProcess):
    """The rank holds its weights and pages."""


@dataclass(frozen=True, slots=True)
class Joined(OfProcess):
    """The rank is a member of all its groups of this generation."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Failed(OfProcess):
    """A call to the rank raised `error`; its process may still live."""

    error: str


@dataclass(frozen=True, slots=True)
class Died(OfProcess):
    """The rank's process is gone."""

    error: str


class Stopped(OfProcess):
    """The rank has left its step loop as it was told to."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The driver that holds the lease is alive."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the world to end, after the accepted requests have ended. `reason` is not empty."""

    reason: str


@dataclass(frozen=True, slots=True)
class Drained:
    """No accepted request is left."""


@dataclass(frozen=True, slots=True)
class Removed:
    """The placement group is gone."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed."""


Event = (
    Begin | Placed | PlacementFailed | Started | Loaded | Joined | Failed | Died | Stopped
    | Beat | StopRequested | Drained | Removed | Tick
)  # fmt: skip

# -- actions: what the shell is to do, in the order given; none of them waits ------------------------------


@dataclass(frozen=True, slots=True)
class CreatePlacement:
    """One bundle per rank. Answer: Placed or PlacementFailed."""


class StartRank(OfProcess):
    """Start the rank's process in its bundle. Answer: Started, Failed or Died."""


class LoadRank(OfProcess):
    """Let it load its own shard. Answer: Loaded, Failed or Died."""


@dataclass(frozen=True, slots=True)
class JoinGeneration(OfProcess):
    """Let it rendezvous with all others, on a store of this generation. Answer: Joined, Failed or Died."""

    generation: Generation


class RunRank(OfProcess):
    """Let it step until it is stopped. Answer, much later: Stopped, Failed or Died."""


@dataclass(frozen=True, slots=True)
class OpenService:
    """Every rank steps: let requests in."""


@dataclass(frozen=True, slots=True)
class DrainService:
    """Let no more requests in, and the accepted ones finish until `until_s`. Answer: Drained."""

    until_s: float


@dataclass(frozen=True, slots=True)
class CloseService:
    """End the service; requests still open fail."""


class StopRank(OfProcess):
    """Tell it to leave its step loop; all ranks are told. Answer: Stopped, Failed or Died."""


class KillRank(OfProcess):
    """End the process, whatever it does; it counts as dead at once and no answer is awaited."""


@dataclass(frozen=True, slots=True)
class RemovePlacement:
    """Give the resources back. Answer: Removed."""


@dataclass(frozen=True, slots=True)
class Report:
    """A line for the log and for whoever watches. `name` as in "rank.loaded"."""

    name: str
    detail: str = ""
    world_rank: WorldRank | None = None
    is_error: bool = False


Action = (
    CreatePlacement | StartRank | LoadRank | JoinGeneration | RunRank | OpenService | DrainService
    | CloseService | StopRank | KillRank | RemovePlacement | Report
)  # fmt: skip
