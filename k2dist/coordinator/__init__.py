"""What the coordinator knows and decides: who waits, which lane, what was said. `service/` is its shell."""

from k2dist.coordinator.admission import Admission, Admitted
from k2dist.coordinator.cluster_feed import ClusterFeed, Member, Membership
from k2dist.coordinator.homes import home_of, new_request_id
from k2dist.coordinator.rate import Account, RateLimit
from k2dist.coordinator.request_log import LoggedOutput, RequestLog
from k2dist.coordinator.router import choose

__all__ = [
    "Account",
    "Admission",
    "Admitted",
    "ClusterFeed",
    "LoggedOutput",
    "Member",
    "Membership",
    "RateLimit",
    "RequestLog",
    "choose",
    "home_of",
    "new_request_id",
]
