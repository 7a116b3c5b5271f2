"""Checksums of a checkpoint's tensors, such that every rank can check just the bytes that it holds.

A tensor has one digest, or, where lanes slice it over tp, one per part: equal runs of rows or of columns.
There are so many parts that a rank of any legal tp holds whole ones: their number is the least common
multiple of all legal tp (16 for K2, whose heads, dense layers and scale blocks allow 1, 2, 4, 8 and 16).

    tp 4    | 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15 |      tp rank 1 checks parts 4 to 7

A digest is BLAKE2b (RFC 7693) of 128 bits over the part's bytes as stored, row after row; of a tensor
without parts it is what `b2sum -l 128` prints of them. No name goes into it, so bytes that lie in the wrong
place are recognised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from k2dist.checkpoint.write import appearing_whole
from k2dist.config.architecture import Architecture
from k2dist.errors import CheckpointError
from k2dist.messages import Message
from k2dist.parallel import Published, Share, TensorRead, legal_tp, published_tensors

MANIFEST_NAME = "k2dist-manifest.json"
DIGEST_BYTES = 16
FORMAT = "k2dist manifest 1: BLAKE2b-128"


class Manifest(Message, frozen=True, kw_only=True):
    """Digests of every tensor that the model computes with, in hexadecimal. About 14 MB for K2's 139,583."""

    format: str = FORMAT
    num_parts: int  # of each tensor that tp slices
    digests: dict[str, tuple[str, ...]]


def num_parts(architecture: Architecture) -> int:
    return math.lcm(*legal_tp(architecture))


def digests(tensor: Tensor, share: Share, count: int) -> tuple[str, ...]:
    """One per part of `tensor`, which is `count` parts wide along the axis that `share` slices."""
    match share:
        case Share.ROWS:
            parts = tensor.chunk(count, 0)
        case Share.COLUMNS:
            parts = tensor.chunk(count, 1)
        case _:
            parts = (tensor,)
    return tuple(_digest(part) for part in parts)


def _digest(part: Tensor) -> str:
    return blake2b(part.contiguous().view(torch.uint8).numpy().data, digest_size=DIGEST_BYTES).hexdigest()


class ManifestChecker:
    """A manifest beside the architecture that it must fit. Raises `CheckpointError` if it does not."""

    def __init__(self, manifest: Manifest, architecture: Architecture, source: str) -> None:
        self._manifest = manifest
        self._published = {tensor.name: tensor for tensor in published_tensors(architecture)}
        self._check_fit(num_parts(architecture), source)
        self._name_of = {listed: name for name, listed in manifest.digests.items()}

    def faults(self, read: TensorRead, tensor: Tensor) -> Iterator[str]:
        """What is wrong with `tensor`, the whole or the slice that `read` describes; nothing if right."""
        published = self._published[read.name]
        first, count = _parts_of(read, published, len(self._manifest.digests[read.name]))
        yield from self._differences(read.name, first, digests(tensor, published.share, count))

    def differences(self, found: Manifest) -> Iterator[str]:
        """The same for every tensor that `found` lists, all of the model's."""
        for name, entries in found.digests.items():
            yield from self._differences(name, 0, entries)

    def _differences(self, name: str, first: int, found: tuple[str, ...]) -> Iterator[str]:
        listed = self._manifest.digests[name]
        wrong = [part for part, digest in enumerate(found, first) if digest != listed[part]]
        if wrong:
            whose = self._name_of.get(found)
            what = f"holds the bytes of {whose}" if whose else "its bytes are not those of the manifest"
            yield f"{name}{_where(self._published[name], len(listed), wrong[0], wrong[-1])}: {what}"

    def _check_fit(self, wanted_parts: int, source: str) -> None:
        """Other names or parts: the manifest was made for another model."""
        listed = self._manifest.digests
        strange = listed.keys() ^ self._published.keys()
        faults = [f"{name}: in one of manifest and model only" for name in sorted(strange)[:1]]
        if self._manifest.num_parts != wanted_parts:
            faults.append(f"num_parts={self._manifest.num_parts}, this model has {wanted_parts}")
        faults += [
            f"{name}: {len(entries)} digests"
            for name, entries in listed.items()
            if name in self._published and len(entries) != _num_digests(self._published[name], wanted_parts)
        ][:1]
        if faults:
            raise CheckpointError(
                f"{source}: not of this model ({'; '.join(faults)}); remove it and run `k2dist verify`"
            )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """`CapacityError` if it cannot be written there."""
    text = msgspec.json.encode(manifest).replace(b'],"', b'],\n"')  # a line per tensor
    with appearing_whole(path, len(text)) as part:
        part.write_bytes(text)


def read_manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{path}: no manifest ({error}); remove it and run `k2dist verify` to write one"
        ) from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: format={manifest.format!r}, this k2dist reads {FORMAT!r}")
    return manifest


def find_checker(model_dir: Path, architecture: Architecture) -> ManifestChecker | None:
    """The manifest beside the checkpoint; None if there is none."""
    path = model_dir / MANIFEST_NAME
    return ManifestChecker(read_manifest(path), architecture, str(path)) if path.is_file() else None


def value_faults(name: str, tensor: Tensor, *, is_scale: bool, first_row: int = 0) -> Iterator[str]:
    """The first NaN or infinity, or scale that is not positive. `first_row`: of the part that is given."""
    if tensor.dtype == torch.float8_e4m3fn:
        is_bad = tensor.view(torch.uint8) & 0x7F == 0x7F  # e4m3fn has two NaN and no infinity
    else:
        is_bad = ~torch.isfinite(tensor)
    if is_scale:
        is_bad = is_bad | (tensor <= 0)
    if is_bad.any():
        row, *rest = is_bad.nonzero()[0].tolist()
        wanted = "finite and positive" if is_scale else "finite"
        yield f"{name}: {float(tensor[(row, *rest)])} at {[row + first_row, *rest]}, should be {wanted}"


def _num_digests(tensor: Published, parts: int) -> int:
    return parts if tensor.share in (Share.ROWS, Share.COLUMNS) else 1


def _parts_of(read: TensorRead, published: Published, listed: int) -> tuple[int, int]:
    """The first part that `read` covers, and how many."""
    match published.share:
        case Share.ROWS:
            start, stop, width = read.row_start, read.row_stop, published.shape[0]
        case Share.COLUMNS:
            start, stop, width = read.col_start, read.col_stop, published.shape[1]
        case _:
            return 0, 1
    step = width // listed
    assert start % step == stop % step == 0, f"{read} cuts a part of {step}"
    return start // step, (stop - start) // step


def _where(published: Published, listed: int, first: int, last: int) -> str:
    if listed == 1:
        return ""
    axis = 0 if published.share is Share.ROWS else 1
    step = published.shape[axis] // listed
    return f", {'rows' if axis == 0 else 'columns'} {first * step} to {(last + 1) * step - 1}"
