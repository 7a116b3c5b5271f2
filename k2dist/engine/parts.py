"""A rank's shard, one part after another: embedding, norm and head together, then each decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest

from msgspec.structs import replace
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles, ReadMemory
from k2dist.parallel import ShardPlan
from k2dist.planner.fewer_layers import reads_by_layer

# Its layer (None: the ends), its reads, and what they gave.
Part = tuple[int | None, ShardPlan, dict[str, Tensor]]


def read_parts(
    files: CheckpointFiles,
    plan: ShardPlan,
    num_layers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Part]:
    """Each part with its tensors; meanwhile the system is asked to fetch the next one from the disk.

    The ends only if this rank reads them, and every layer, also one of which it reads nothing. The tensors of
    a part are there until the next one is asked for: its mapping is emptied then, and the memory of a layer's
    is read into again, unless somebody still holds some.
    """
    memory = ReadMemory()
    parts = list(_parts(plan, num_layers))
    for (layer, part), following in zip_longest(parts, parts[1:]):
        tensors = files.read_all(part, progress, memory=None if layer is None else memory)  # embedding: kept
        if following is not None:
            files.fetch(following[1])
        yield layer, part, tensors
        tensors.clear()


def _parts(plan: ShardPlan, num_layers: int) -> Iterator[tuple[int | None, ShardPlan]]:
    by_layer = reads_by_layer(plan.reads)
    for layer in (*([None] if None in by_layer else []), *range(num_layers)):
        yield layer, replace(plan, reads=tuple(by_layer.get(layer, ())), skips=())
