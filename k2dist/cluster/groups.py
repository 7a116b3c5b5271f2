"""A rank's groups in one generation, over the store that the supervisor hosts for it."""

from __future__ import annotations

import torch

from k2dist.cluster.world import Rendezvous
from k2dist.comm import Alone, Communicator, DistCommunicator, NcclCommunicator, join_store
from k2dist.comm.introductions import introduce
from k2dist.config.cluster import DeadlinesConfig
from k2dist.engine import RankComms
from k2dist.ids import WorldRank
from k2dist.parallel import Layout
from k2dist.parallel.fingerprint import Fingerprint, Introduction


def join_groups(
    meeting: Rendezvous,
    layout: Layout,
    world_rank: WorldRank,
    *,
    address: str,
    device: torch.device,
    deadlines: DeadlinesConfig,
    fingerprint: Fingerprint,
    allows_mix: bool,
) -> RankComms:
    """Meet the other ranks; this one listens at `address`. Collective, over all ranks of `layout`. Before any
    group is made, all see that they are alike; ConfigError if they are not.

    Data and control have a group each, so that a plan never waits behind rows. Rows on a CUDA `device` travel
    over NCCL; plans are on the CPU, and travel over gloo. Errors: PeerError.
    """
    store = join_store(meeting.host, meeting.port, deadlines.join_s)
    introduce(
        store,
        Introduction(world_rank=world_rank, node=address, fingerprint=fingerprint),
        generation=meeting.generation,
        num_ranks=layout.world_size,
        allows_mix=allows_mix,
        deadline_s=deadlines.join_s,
    )

    def data_group(name: str, members: tuple[WorldRank, ...]) -> Communicator:
        if device.type == "cpu" or len(members) == 1:
            return group(name, members)
        return NcclCommunicator(
            store,
            generation=meeting.generation,
            name=name,
            members=members,
            world_rank=world_rank,
            device=device,
            deadline_s=deadlines.step_s,
            join_deadline_s=deadlines.join_s,
        )

    def group(name: str, members: tuple[WorldRank, ...]) -> Communicator:
        if len(members) == 1:
            return Alone()
        return DistCommunicator(
            store,
            generation=meeting.generation,
            name=name,
            members=members,
            world_rank=world_rank,
            address=address,
            deadline_s=deadlines.step_s,
            join_deadline_s=deadlines.join_s,
        )

    everyone = tuple(place.world_rank for place in layout.ranks)
    world, world_control = data_group("world", everyone), group("world-control", everyone)
    lane = layout.place(world_rank).lane
    if lane is None:
        return RankComms(world, world_control, None, None)
    members = layout.members(lane)
    return RankComms(
        world, world_control, data_group(f"lane-{lane}", members), group(f"lane-{lane}-control", members)
    )
