"""What a layout costs, survives and gives, before anything is started: pure, and printable."""

from k2dist.planner.assumptions import ASSUMED, Assumptions
from k2dist.planner.cost import PartCost, StepCost, StepModel
from k2dist.planner.estimate import Estimate, Phase, Workload
from k2dist.planner.held import Kind, kind_of
from k2dist.planner.losses import Losses, Remainder, survivable_losses
from k2dist.planner.memory import MemoryPlan, check_memory, plan_memory
from k2dist.planner.plan import ClusterPlan, fitting_workload, plan_cluster
from k2dist.planner.rank_memory import RankMemory
from k2dist.planner.start import StartEstimate
from k2dist.planner.terms import (
    Form,
    Terms,
    configured_terms,
    form_named,
    native_form,
    reference_form,
    triton_form,
)

__all__ = [
    "ASSUMED",
    "Assumptions",
    "ClusterPlan",
    "Estimate",
    "Form",
    "Kind",
    "Losses",
    "MemoryPlan",
    "PartCost",
    "Phase",
    "RankMemory",
    "Remainder",
    "StartEstimate",
    "StepCost",
    "StepModel",
    "Terms",
    "Workload",
    "check_memory",
    "configured_terms",
    "fitting_workload",
    "form_named",
    "kind_of",
    "native_form",
    "plan_cluster",
    "plan_memory",
    "reference_form",
    "survivable_losses",
    "triton_form",
]
