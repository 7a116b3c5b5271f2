"""Every byte of a checkpoint read once: digests of all tensors, and values that no weight should have.

Memory in use: a few tensors at a time; those whose rows are sliced are read part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from k2dist.checkpoint.load import CheckpointFiles
from k2dist.checkpoint.manifest import Manifest, digests, num_parts, value_faults
from k2dist.config.architecture import Architecture
from k2dist.parallel import Published, Share, TensorRead, first_layout, published_tensors, shard_plan
from k2dist.parallel.published import SCALE_SUFFIX


class Survey(NamedTuple):
    """What was found. `faults`: values that are not finite, scales that are not positive, each named."""

    manifest: Manifest
    faults: list[str]
    num_bytes: int


def survey(
    model_dir: Path,
    architecture: Architecture,
    progress: Callable[[int, int], None] | None = None,
    num_threads: int = 4,
) -> Survey:
    """Read the whole checkpoint. `progress(bytes done, bytes in all)` from the calling thread.

    Raises `CheckpointError` for names, shapes, dtypes and sizes that are not those of `architecture`.
    """
    parts = num_parts(architecture)
    found: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    tensors = list(published_tensors(architecture))
    num_bytes, num_bytes_done = sum(tensor.num_bytes for tensor in tensors), 0
    with CheckpointFiles(model_dir) as files:
        files.check(shard_plan(architecture, first_layout(architecture, lanes=1, tp=1), 0))
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="survey")
        try:
            looked_at = pool.map(lambda tensor: _look_at(files, tensor, parts), tensors)
            for tensor, (entries, its_faults) in zip(tensors, looked_at, strict=True):
                found[tensor.name] = entries
                faults += its_faults
                num_bytes_done += tensor.num_bytes
                if progress is not None:
                    progress(num_bytes_done, num_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
    return Survey(Manifest(num_parts=parts, digests=found), faults, num_bytes)


def unused_files(model_dir: Path) -> tuple[str, ...]:
    """Names of safetensors files that the index does not name: left of another download, it may be."""
    with CheckpointFiles(model_dir) as files:
        used = {each.name for each in files.maps()}
    return tuple(sorted(path.name for path in model_dir.glob("*.safetensors") if path.name not in used))


def _look_at(files: CheckpointFiles, tensor: Published, parts: int) -> tuple[tuple[str, ...], list[str]]:
    """One tensor's digests, and its faults."""
    is_scale = tensor.name.endswith(SCALE_SUFFIX)
    if tensor.share is not Share.ROWS:
        value = files.read(_rows(tensor, 0, tensor.shape[0]))
        return digests(value, tensor.share, parts), list(value_faults(tensor.name, value, is_scale=is_scale))
    step = tensor.shape[0] // parts
    entries: list[str] = []
    faults: list[str] = []
    for first in range(0, tensor.shape[0], step):
        value = files.read(_rows(tensor, first, first + step))
        entries += digests(value, Share.WHOLE, 1)
        if not faults:
            faults += value_faults(tensor.name, value, is_scale=is_scale, first_row=first)
    return tuple(entries), faults


def _rows(tensor: Published, start: int, stop: int) -> TensorRead:
    return TensorRead(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        row_start=start,
        row_stop=stop,
        col_start=0,
        col_stop=1 if len(tensor.shape) == 1 else tensor.shape[1],
    )
