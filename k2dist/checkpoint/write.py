"""Write a checkpoint in the published form: block FP8, one layer per file, an index that comes last.

Files appear whole or not at all: each is written beside its name and renamed, and the index, without which
nothing loads, is removed first and written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from k2dist.checkpoint.names import INDEX_NAME
from k2dist.checkpoint.quantise import quantise_block_fp8
from k2dist.checkpoint.safetensors_file import TORCH_DTYPES
from k2dist.config.architecture import Architecture
from k2dist.errors import CapacityError, CheckpointError
from k2dist.parallel.files import METADATA, by_file, shard_name
from k2dist.parallel.published import (
    SCALE_SUFFIX,
    Published,
    Share,
    leftover_tensors,
    published_tensors,
)


def write_checkpoint(
    model_dir: Path,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    *,
    shards: int | None = None,
    padded_names: bool = False,
    with_inv_freq: bool = False,
) -> None:
    """Write `tensors` (float, by published name, no scales) as safetensors files and their index.

    `shards`: number of files, at most one per layer, which is the default. `padded_names`:
    `model-00001-of-000061` as 0905 has them, in place of `model-1-of-61`. `with_inv_freq`: with the leftover
    tensors that K2's own files hold. `config.json` is the caller's. Memory in use beyond `tensors`: one file.

    Raises `CheckpointError` for a tensor that is missing, extra, mis-shaped or not finite, before anything is
    written; `CapacityError` if the disk is full, with no part of a file left behind.
    """
    num_shards = architecture.num_layers if shards is None else shards
    if not 1 <= num_shards <= architecture.num_layers:
        raise ValueError(f"shards={shards}: use 1 to {architecture.num_layers}, at most one per layer")
    _check_complete(architecture, tensors)
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / INDEX_NAME).unlink(missing_ok=True)
    leftovers = leftover_tensors(architecture) if with_inv_freq else ()
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, group in enumerate(by_file(architecture, num_shards, leftovers), start=1):
        name = shard_name(number, num_shards, padded=padded_names)
        contents = {tensor.name: value for tensor, value in _published_values(architecture, tensors, group)}
        _write_file(model_dir / name, contents)
        weight_map.update(dict.fromkeys(contents, name))
        num_bytes += sum(tensor.num_bytes for tensor in group)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_text(model_dir / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def publish(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the files of `write_checkpoint` would hold, in memory: float8 weights, scales, bfloat16 rest."""
    _check_complete(architecture, tensors)
    everything = list(published_tensors(architecture))
    return {tensor.name: value for tensor, value in _published_values(architecture, tensors, everything)}


def _check_complete(architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    expected = {
        tensor.name: tensor.shape
        for tensor in published_tensors(architecture)
        if not tensor.name.endswith(SCALE_SUFFIX)
    }
    faults = [f"{name}: missing" for name in expected.keys() - tensors.keys()]
    faults += [f"{name}: not a tensor of this architecture" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if tuple(tensors[name].shape) != expected[name]:
            faults.append(f"{name}: shape {list(tensors[name].shape)}, expected {list(expected[name])}")
    if faults:
        shown = "; ".join(sorted(faults)[:5])
        raise CheckpointError(f"cannot write a checkpoint, {len(faults)} faults: {shown}")


def _published_values(
    architecture: Architecture, tensors: Mapping[str, Tensor], group: Iterable[Published]
) -> Iterator[tuple[Published, Tensor]]:
    """Each tensor in its published dtype; a scale comes right after the weight it was made with."""
    scale = torch.empty(0)
    for tensor in group:
        if tensor.share is Share.UNUSED:
            yield tensor, torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
        elif tensor.name.endswith(SCALE_SUFFIX):
            yield tensor, scale
        elif tensor.dtype == "F8_E4M3":
            assert architecture.scale_block is not None
            quantised, scale = _quantise(tensor.name, tensors[tensor.name], architecture.scale_block)
            yield tensor, quantised
        else:
            yield (
                tensor,
                tensors[tensor.name].detach().to("cpu", TORCH_DTYPES[tensor.dtype], copy=True).contiguous(),
            )


def _quantise(name: str, weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    try:
        return quantise_block_fp8(weight.detach().cpu(), block)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _write_file(path: Path, contents: dict[str, Tensor]) -> None:
    num_bytes = sum(value.nbytes for value in contents.values())
    with appearing_whole(path, num_bytes) as part:
        save_file(contents, part, metadata=METADATA)


def _write_text(path: Path, text: str) -> None:
    with appearing_whole(path, len(text)) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def appearing_whole(path: Path, num_bytes: int) -> Iterator[Path]:
    """A name to write to; on success the bytes are made durable and take `path`, else nothing is left."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.chmod(0o644)  # safetensors writes 0600
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise CapacityError(f"cannot write {path} ({num_bytes:,} bytes): {error}; free some space") from error
    finally:
        part.unlink(missing_ok=True)
