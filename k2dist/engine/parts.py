"""A rank's shard, one part after another: embedding, norm and head together, then each decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from msgspec.structs import replace
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles, ReadMemory
from k2dist.parallel import ShardPlan
from k2dist.planner.fewer_layers import reads_by_layer

Part = tuple[
    int | None, ShardPlan, dict[str, Tensor]
]  # its layer (None: the ends), its reads, what they gave


def read_parts(
    files: CheckpointFiles, plan: ShardPlan, progress: Callable[[int, int], None] | None = None
) -> Iterator[Part]:
    """Each part with its tensors; the next one is read meanwhile, and `progress` told by another thread.

    The tensors of a part are there until the next one is asked for: its mapping is emptied then, and the
    memory of a layer's is read into again, unless somebody still holds some.
    """
    memory = ReadMemory()

    def read(layer: int | None, part: ShardPlan) -> dict[str, Tensor]:
        return files.read_all(part, progress, memory=None if layer is None else memory)  # embedding: kept

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        parts = list(_parts(plan))
        coming = reader.submit(read, *parts[0]) if parts else None
        for (layer, part), following in zip_longest(parts, parts[1:]):
            assert coming is not None
            tensors = coming.result()
            coming = reader.submit(read, *following) if following else None
            yield layer, part, tensors
            tensors.clear()


def _parts(plan: ShardPlan) -> Iterator[tuple[int | None, ShardPlan]]:
    by_layer = reads_by_layer(plan.reads)
    for layer in sorted(by_layer, key=lambda layer: -1 if layer is None else layer):
        yield layer, replace(plan, reads=tuple(by_layer[layer]), skips=())
