"""One rank: it loads its shard, takes part in every step, and on a lane's first rank it schedules the lane.

`RankRuntime` is the whole of a rank; a Ray actor (`cluster`) or a thread (`LocalWorld`) hosts one. Nothing
here knows of Ray, gRPC or HTTP.
"""

from k2dist.engine.feed import Feed, Generated
from k2dist.engine.lane import LanePort
from k2dist.engine.local import LocalWorld
from k2dist.engine.runtime import Bells, LoadReport, RankComms, RankRuntime
from k2dist.engine.spec import RankSpec

__all__ = [
    "Bells",
    "Feed",
    "Generated",
    "LanePort",
    "LoadReport",
    "LocalWorld",
    "RankComms",
    "RankRuntime",
    "RankSpec",
]
