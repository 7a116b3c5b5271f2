"""Checksums that came with a checkpoint: SHA-256 of whole files, as whoever published it has stated them.

    SHA256SUMS                                        as `sha256sum` writes it: a checksum, two marks, a name
    .cache/huggingface/download/<file>.metadata       what huggingface_hub leaves beside a download: revision,
                                                      etag, time; of a large file the etag is its SHA-256

Nothing is fetched. Where both say something of a file, both must be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from k2dist.errors import CheckpointError

SUMS_NAME = "SHA256SUMS"
HUB_DIR = Path(".cache/huggingface/download")
NUM_THREADS = 4
_PIECE_BYTES = 16 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")

Sum = tuple[str, str, str]  # file name, SHA-256, who says so


def published_sums(model_dir: Path) -> tuple[Sum, ...]:
    """What is stated of files of `model_dir`, by name; empty if nothing is."""
    return tuple(sorted({*_listed(model_dir), *_of_hub(model_dir)}))


def sum_faults(
    model_dir: Path, sums: tuple[Sum, ...], progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """A line for each stated file that is missing or has other bytes. Reads each file once.

    `progress(bytes done, bytes in all)` after each file, from the calling thread.
    """
    names = sorted({name for name, _, _ in sums})
    sizes = {name: path.stat().st_size for name in names if (path := model_dir / name).is_file()}
    found: dict[str, str] = {}
    num_bytes_done = 0
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="sha256") as pool:
        for name, digest in zip(sizes, pool.map(lambda name: _digest(model_dir / name), sizes), strict=True):
            found[name] = digest
            num_bytes_done += sizes[name]
            if progress is not None:
                progress(num_bytes_done, sum(sizes.values()))
    return [
        f"{name}: missing, and {source} lists it; fetch it"
        if name not in found
        else f"{name}: its SHA-256 is {found[name]}, and {wanted} by {source}; fetch it again"
        for name, wanted, source in sums
        if found.get(name) != wanted
    ]


def _listed(model_dir: Path) -> Iterator[Sum]:
    path = model_dir / SUMS_NAME
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        digest, _, name = line.partition(" ")
        name = name.removeprefix(" ").removeprefix("*").removeprefix("./")
        if not line.strip():
            continue
        if not _SHA256.fullmatch(digest) or Path(name).name != name:
            raise CheckpointError(f"{path}: line {number} is not a SHA-256 and a file name; fetch it again")
        yield name, digest, SUMS_NAME


def _of_hub(model_dir: Path) -> Iterator[Sum]:
    """Small files have a git hash for an etag, which is not of their bytes alone."""
    for path in sorted((model_dir / HUB_DIR).glob("*.metadata")):
        lines = path.read_text().splitlines()
        if len(lines) >= 2 and _SHA256.fullmatch(lines[1].strip()):
            yield path.name.removesuffix(".metadata"), lines[1].strip(), "the hub"


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
