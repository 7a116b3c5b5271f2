"""What is wrong with the machines before anything is loaded: facts in, findings with remedies out. Pure.

k2dist.probe ──ClusterFacts──> diagnose(facts, needs) ──findings──> `k2dist doctor`, `k2dist serve`
"""

from k2dist.doctor.diagnosis import diagnose
from k2dist.doctor.facts import ClusterFacts, NodeFacts
from k2dist.doctor.finding import Finding, Level, errors_of, warnings_of
from k2dist.doctor.needs import Needs, needs_of

__all__ = [
    "ClusterFacts",
    "Finding",
    "Level",
    "Needs",
    "NodeFacts",
    "diagnose",
    "errors_of",
    "needs_of",
    "warnings_of",
]
