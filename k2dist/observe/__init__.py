"""What a run says of itself, as plain objects that are handed down; nothing here measures a clock."""

from k2dist.observe.health import HealthJudge
from k2dist.observe.histogram import Histogram, HistogramFacts
from k2dist.observe.journey import Journey, OutputTrace, Trace
from k2dist.observe.late import Hang, find_hang
from k2dist.observe.recoveries import Recoveries, RecoveryFacts
from k2dist.observe.requests import RequestBook, RequestFacts, TenantFacts
from k2dist.observe.skew import Skew, SkewWindow
from k2dist.observe.state import (
    ClusterState,
    LaneView,
    LayerLoad,
    RankView,
    StepPair,
    WorldState,
)
from k2dist.observe.waits import Waits

__all__ = [
    "ClusterState",
    "Hang",
    "HealthJudge",
    "Histogram",
    "HistogramFacts",
    "Journey",
    "LaneView",
    "LayerLoad",
    "OutputTrace",
    "RankView",
    "Recoveries",
    "RecoveryFacts",
    "RequestBook",
    "RequestFacts",
    "Skew",
    "SkewWindow",
    "StepPair",
    "TenantFacts",
    "Trace",
    "Waits",
    "WorldState",
    "find_hang",
]
