"""Identities, each its own type, so that a count or an index cannot be passed for one."""

from typing import NewType

WorldRank = NewType("WorldRank", int)
TpRank = NewType("TpRank", int)
LaneId = NewType("LaneId", int)
ExpertId = NewType("ExpertId", int)  # logical expert, 0 .. n_routed_experts - 1
SlotId = NewType("SlotId", int)  # place on a rank that holds a copy of one expert, 0-based on that rank
SeqId = NewType("SeqId", int)  # one output of one request on one lane
PageId = NewType("PageId", int)
RequestId = NewType("RequestId", str)
Generation = NewType("Generation", int)  # of the world: grows by one whenever its members change
