"""One lane's plan: which sequences compute which positions in the next step. Pure; time is an argument."""

from k2dist.scheduler.bounds import MAX_LOGPROBS, check_request, check_sampling
from k2dist.scheduler.core import Scheduler
from k2dist.scheduler.limits import Limits

__all__ = ["MAX_LOGPROBS", "Limits", "Scheduler", "check_request", "check_sampling"]
