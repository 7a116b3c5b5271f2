"""The files of a checkpoint, down to the byte, without any: what `checkpoint.write` would write.

One layer per file unless fewer files are asked for; the embedding in the first, norm and head in the last.
Within a file the widest dtypes come first and then names in order, which is how the safetensors library lays
tensors out (its `prepare`: dtype descending, then name); a test holds this to files that it wrote.

    8 bytes   header, JSON, padded with spaces to a multiple of 8   tensors, without a gap
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from k2dist.config.architecture import Architecture
from k2dist.parallel.published import DTYPE_BYTES, Published, leftover_tensors, published_tensors

METADATA = {"format": "pt"}
_LENGTH_BYTES = 8  # of the header's length, before the header


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes [begin, end) of its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class FileMap:
    """One file: `tensors` by name, in the order of their bytes, from `header_bytes` to `num_bytes`."""

    name: str
    header_bytes: int
    num_bytes: int
    tensors: dict[str, StoredTensor]


def file_maps(
    architecture: Architecture,
    *,
    shards: int | None = None,
    padded_names: bool = False,
    with_inv_freq: bool = False,
) -> Iterator[FileMap]:
    """The files that `write_checkpoint` would write with these arguments, in order."""
    num_shards = architecture.num_layers if shards is None else shards
    leftovers = leftover_tensors(architecture) if with_inv_freq else ()
    for number, group in enumerate(by_file(architecture, num_shards, leftovers), start=1):
        yield _file_map(shard_name(number, num_shards, padded=padded_names), group)


def by_file(
    architecture: Architecture, num_shards: int, leftovers: Iterable[Published] = ()
) -> Iterator[list[Published]]:
    """The tensors of each file, in the order of the layers; scales follow their weights."""
    groups: list[list[Published]] = [[] for _ in range(num_shards)]
    for tensor in (*published_tensors(architecture), *leftovers):
        if tensor.layer is None:
            index = 0 if tensor.name.startswith("model.embed_tokens") else num_shards - 1
        else:
            index = tensor.layer * num_shards // architecture.num_layers
        groups[index].append(tensor)
    yield from groups


def shard_name(number: int, num_shards: int, *, padded: bool) -> str:
    """The file of shard `number` (from 1): K2-Instruct does not pad, 0905 pads 5 and 6 digits."""
    if padded:
        return f"model-{number:05d}-of-{num_shards:06d}.safetensors"
    return f"model-{number}-of-{num_shards}.safetensors"


def _file_map(name: str, group: list[Published]) -> FileMap:
    ordered = sorted(group, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    offsets = list(accumulate((tensor.num_bytes for tensor in ordered), initial=0))
    spans = list(zip(ordered, pairwise(offsets), strict=True))
    header: dict[str, object] = {"__metadata__": METADATA}
    for tensor, span in spans:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
    json_bytes = len(json.dumps(header, separators=(",", ":")))
    header_bytes = _LENGTH_BYTES + -(-json_bytes // 8) * 8
    tensors = {
        tensor.name: StoredTensor(tensor.dtype, tensor.shape, header_bytes + begin, header_bytes + end)
        for tensor, (begin, end) in spans
    }
    return FileMap(name, header_bytes, header_bytes + offsets[-1], tensors)
