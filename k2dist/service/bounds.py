"""How much of what there may be at a time, as it follows from the config."""

from __future__ import annotations

from k2dist.config.cluster import ClusterConfig


def max_requests(config: ClusterConfig) -> int:
    """As many as the coordinator queues and the lanes run; more could only wait."""
    return config.service.max_queued + config.parallel.lanes * config.scheduler.max_running
