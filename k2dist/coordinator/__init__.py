"""What the coordinator knows and decides: who waits, which lane, what was said. `service/` is its shell."""

from k2dist.coordinator.admission import Admission, Admitted
from k2dist.coordinator.request_log import LoggedOutput, RequestLog
from k2dist.coordinator.router import choose

__all__ = ["Admission", "Admitted", "LoggedOutput", "RequestLog", "choose"]
