"""File names of a checkpoint, and names in it that are passed over on purpose."""

from __future__ import annotations

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"  # a checkpoint of one file needs no index


def shard_name(number: int, num_shards: int, *, padded: bool) -> str:
    """The file of shard `number` (from 1): K2-Instruct does not pad, 0905 pads 5 and 6 digits."""
    if padded:
        return f"model-{number:05d}-of-{num_shards:06d}.safetensors"
    return f"model-{number}-of-{num_shards}.safetensors"
