"""A cluster measured as its users and its operator meet it: idle cost, first and next token, calls in a step.

One run: a Ray of its own, in it first as many empty actors as the cluster has, then the cluster itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray

from k2dist.bench.calls import CALLS_PER_S, CallCost, call_waits, step_cost
from k2dist.bench.idle import IdleCost, cpu_percents, empty_actors, idle_cost
from k2dist.bench.waits import SETTLE_S, FirstToken, NextToken, decoding, first_token, next_token
from k2dist.cluster.ray_host import start_host
from k2dist.cluster.start import joined_ray, start_cluster
from k2dist.cluster.world import World
from k2dist.messages import Message
from k2dist.service.client import AsyncClient
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.gateway_actor import GatewayActor

_QUIET_S = 8.0  # Ray goes on for so long with what a start has begun
_NUM_WINDOWS = 3


class Latency(Message, frozen=True, kw_only=True):
    idle: IdleCost
    first_token: FirstToken
    calls: CallCost
    next_token: NextToken


def num_notes(num_samples: int) -> int:
    """How often `measure` says that it has come on."""
    return 2 * _NUM_WINDOWS + num_samples + num_samples + 2 * _NUM_WINDOWS + _NUM_WINDOWS


def measure(world: World, *, num_samples: int, window_s: float, note: Callable[[], None]) -> Latency:
    """Errors: as `start_cluster`."""
    config = world.config
    num_gateways = 0 if config.service.http is None else 1
    num_actors = world.layout.world_size + 2 + num_gateways  # the 2: supervisor and coordinator
    host = start_host(config.ray, is_detached=False, deadline_s=config.deadlines.start_s)
    try:
        root_pid = host.process.mark.pid
        with joined_ray(host.process.address, "bench"), empty_actors(num_actors):
            time.sleep(_QUIET_S)
            actors = cpu_percents(root_pid, _NUM_WINDOWS, window_s, note)
        address = host.process.address
        with start_cluster(
            world,
            CoordinatorActor,
            GatewayActor,
            ray_address=address,
            is_detached=False,
            tell=lambda text: None,
        ) as cluster:
            status = cluster.await_serving(lambda status: None)
            time.sleep(_QUIET_S)
            idle = cpu_percents(root_pid, _NUM_WINDOWS, window_s, note)
            lane = _actor(status.ranks[world.first_ranks()[0]].pid)
            waits = _ask(world, status.address, lane, num_samples, window_s, note)
            first, calls, following = asyncio.run(waits)
    finally:
        host.stop(config.deadlines.stop_s)
    return Latency(
        idle=idle_cost(num_actors, window_s, idle, actors),
        first_token=first,
        calls=calls,
        next_token=following,
    )


async def _ask(
    world: World,
    address: str,
    lane: Any,
    num_samples: int,
    window_s: float,
    note: Callable[[], None],
) -> tuple[FirstToken, CallCost, NextToken]:
    async with AsyncClient(address) as client:
        first = await first_token(client, num_samples, note)
        async with decoding(client), decoding(client):
            await asyncio.sleep(SETTLE_S)
            admit_ms, cancel_ms = await asyncio.to_thread(call_waits, lane, num_samples, note)
            without, with_calls = await asyncio.to_thread(step_cost, lane, window_s, _NUM_WINDOWS, note)
        prompt_len = 2 * world.config.scheduler.chunk_tokens
        following = await next_token(
            client, prompt_len=prompt_len, window_s=window_s, num_windows=_NUM_WINDOWS, note=note
        )
    calls = CallCost(
        admit_ms=admit_ms,
        cancel_ms=cancel_ms,
        step_ms=without,
        step_ms_with_calls=with_calls,
        calls_per_s=CALLS_PER_S,
    )
    return first, calls, following


def _actor(pid: int) -> Any:
    """The named actor of the joined namespace that is process `pid`."""
    for name in ray.util.list_named_actors():
        actor = ray.get_actor(name)
        if name.startswith("rank-") and ray.get(actor.process.remote()).pid == pid:
            return actor
    raise AssertionError(f"no rank is process {pid}")
