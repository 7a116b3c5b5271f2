"""One lane's plan: which sequences compute which positions in the next step. Pure; time is an argument."""

from k2dist.scheduler.bounds import MAX_LOGPROBS, check_request
from k2dist.scheduler.cadence import PrefillCadence
from k2dist.scheduler.core import Scheduler
from k2dist.scheduler.limits import Limits
from k2dist.scheduler.resolve import PartialSampling, resolve_sampling

__all__ = [
    "MAX_LOGPROBS",
    "Limits",
    "PartialSampling",
    "PrefillCadence",
    "Scheduler",
    "check_request",
    "resolve_sampling",
]
