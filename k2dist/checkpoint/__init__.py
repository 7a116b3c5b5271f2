"""Files to tensors and back: a rank reads its own bytes of a published checkpoint, checked by name."""

from k2dist.checkpoint.load import CheckpointFiles, load_shard
from k2dist.checkpoint.quantise import dequantise_block_fp8, quantise_block_fp8
from k2dist.checkpoint.random_shard import RandomShard
from k2dist.checkpoint.random_weights import random_tensors
from k2dist.checkpoint.read_memory import ReadMemory
from k2dist.checkpoint.write import publish, write_checkpoint

__all__ = [
    "CheckpointFiles",
    "RandomShard",
    "ReadMemory",
    "dequantise_block_fp8",
    "load_shard",
    "publish",
    "quantise_block_fp8",
    "random_tensors",
    "write_checkpoint",
]
