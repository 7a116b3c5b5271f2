"""What a layout costs and survives, in bytes, before anything is started: pure, and printable."""

from k2dist.planner.held import Kind, kind_of
from k2dist.planner.losses import Losses, Remainder, survivable_losses
from k2dist.planner.memory import MemoryPlan, check_memory, plan_memory
from k2dist.planner.rank_memory import RankMemory
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
    "Form",
    "Kind",
    "Losses",
    "MemoryPlan",
    "RankMemory",
    "Remainder",
    "Terms",
    "check_memory",
    "configured_terms",
    "form_named",
    "kind_of",
    "native_form",
    "plan_memory",
    "reference_form",
    "survivable_losses",
    "triton_form",
]
