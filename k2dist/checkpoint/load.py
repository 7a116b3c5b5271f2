"""Load one rank's part of a checkpoint, with every name in it accounted for.

index.json -> files -> headers        what there is, all of it, before any tensor is read
shard plan                            what should be there, and which rectangles this rank wants
ranged reads                          those bytes and no others, several pieces at a time
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec
import torch
from torch import Tensor

from k2dist.checkpoint.names import INDEX_NAME, SINGLE_NAME
from k2dist.checkpoint.read_memory import ReadMemory
from k2dist.checkpoint.safetensors_file import SafetensorsFile
from k2dist.errors import CheckpointError
from k2dist.parallel.files import FileMap
from k2dist.parallel.published import DTYPE_BYTES, SCALE_SUFFIX
from k2dist.parallel.shard_plan import ShardPlan, TensorRead

NUM_FAULTS_SHOWN = 5
NUM_THREADS = 8  # of one rank; they wait for storage, not for a core
ALIGNMENT = 64  # of what is read in one go, in memory: a cache line
PIECES_AHEAD = 8  # for each thread: K2's scales are 3,584 bytes, so one piece ahead would starve it


def load_shard(
    model_dir: Path, plan: ShardPlan, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """Every tensor of `plan.reads` by its published name, sliced, on the CPU.

    `progress(bytes done, bytes in all)` after each piece, from the calling thread. Memory in use: the
    shard's own bytes, read to where they stay. Raises `CheckpointError` naming tensor, file, what was
    expected and what was found.
    """
    with CheckpointFiles(model_dir) as files:
        files.check(plan)
        return files.read_all(plan, progress)


class CheckpointFiles:
    """The safetensors files of one model directory, open, with index and headers read and in agreement."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.num_bytes_read = 0  # of tensors; headers not counted
        self._file_of: dict[str, SafetensorsFile] = {}
        with ExitStack() as opening:
            weight_map = _read_index(model_dir)
            names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
            for name in names:
                file = opening.enter_context(SafetensorsFile(model_dir / name))
                self._claim(file)
            if weight_map is not None:
                _raise_faults(model_dir, self._index_faults(weight_map))
            self._open = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def check(self, plan: ShardPlan) -> None:
        """Raise `CheckpointError` unless the files hold what `plan` expects, and nothing besides."""
        _raise_faults(self.model_dir, self._plan_faults(plan))

    def maps(self) -> list[FileMap]:
        """Where every tensor lies, file by file."""
        files = dict.fromkeys(self._file_of.values())
        return [FileMap(file.path.name, file.header_bytes, file.num_bytes, file.tensors) for file in files]

    def read(self, wanted: TensorRead) -> Tensor:
        return self._file_of[wanted.name].read(wanted)

    def read_all(
        self,
        plan: ShardPlan,
        progress: Callable[[int, int], None] | None = None,
        num_threads: int = NUM_THREADS,
        memory: ReadMemory | None = None,
    ) -> dict[str, Tensor]:
        """The plan's tensors, in its order; in `memory` if it is given, else each in memory of its own.

        Threads share the pieces of all files, also of one tensor: one thread seldom saturates a disk, and
        half of a small shard may be embedding and head.
        """
        num_bytes = plan.num_bytes
        tensors: dict[str, Tensor] = {}
        under_way: deque[Future[int]] = deque()

        def finish_one() -> None:
            self.num_bytes_read += under_way.popleft().result()
            if progress is not None:
                progress(self.num_bytes_read, num_bytes)

        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")
        try:
            for wanted, place in self._places(plan.reads, memory):
                found, pieces = self._file_of[wanted[0].name].open_read(wanted, place)
                tensors |= found
                for fill in pieces:
                    if len(under_way) >= num_threads * PIECES_AHEAD:
                        finish_one()
                    under_way.append(pool.submit(fill))
            while under_way:
                finish_one()
        finally:
            pool.shutdown(cancel_futures=True)  # a fault does not wait for the rest of the shard
        return {wanted.name: tensors[wanted.name] for wanted in plan.reads}

    def fetch(self, plan: ShardPlan) -> None:
        """Ask the system to have the plan's bytes in its cache soon; nobody waits, and nothing is held."""
        for group in self._adjoining(plan.reads):
            self._file_of[group[0].name].fetch(group[0], group[-1])

    def _places(
        self, reads: Sequence[TensorRead], memory: ReadMemory | None
    ) -> Iterator[tuple[list[TensorRead], Tensor]]:
        """What is read in one go, and to where."""
        if memory is None:
            for wanted in reads:
                yield [wanted], torch.empty(wanted.num_bytes, dtype=torch.uint8)
            return
        groups = self._adjoining(reads)
        sizes = [sum(wanted.num_bytes for wanted in group) for group in groups]
        whole, place = memory.take(sum(size + -size % ALIGNMENT for size in sizes)), 0
        for group, size in zip(groups, sizes, strict=True):
            yield group, whole[place : place + size]
            place += size + -size % ALIGNMENT

    def _adjoining(self, reads: Iterable[TensorRead]) -> list[list[TensorRead]]:
        """Reads whose bytes follow one another in a file: all of a layer's, on a rank that reads it whole."""
        groups: list[list[TensorRead]] = []
        begin = end = 0
        last: SafetensorsFile | None = None
        for file, wanted in sorted(
            ((self._file_of[wanted.name], wanted) for wanted in reads),
            key=lambda pair: (pair[0].path, pair[0].tensors[pair[1].name].begin),
        ):
            extent = file.extent(wanted)
            follows = extent is not None and file is last and extent[0] == end
            if follows and (end - begin) % DTYPE_BYTES[wanted.dtype] == 0:  # a tensor has to be aligned
                groups[-1].append(wanted)
            else:
                groups.append([wanted])
                begin = 0 if extent is None else extent[0]
            last, end = file, -1 if extent is None else extent[1]
        return groups

    def _claim(self, file: SafetensorsFile) -> None:
        for name in file.tensors:
            other = self._file_of.setdefault(name, file)
            if other is not file:
                raise CheckpointError(
                    f"{name}: in both {other.path.name} and {file.path.name} of {self.model_dir}"
                )

    def _index_faults(self, weight_map: dict[str, str]) -> Iterator[str]:
        for name, file_name in weight_map.items():
            file = self._file_of.get(name)
            if file is None or file.path.name != file_name:
                found = "in no file" if file is None else f"found in {file.path.name}"
                yield f"{name}: the index says it is in {file_name}, {found}"
        for name in self._file_of.keys() - weight_map.keys():
            yield f"{name}: in {self._file_of[name].path.name} but not in the index"

    def _plan_faults(self, plan: ShardPlan) -> Iterator[str]:
        for wanted in plan.reads:
            yield from self._read_faults(wanted)
        for skip in plan.skips:
            if not skip.is_optional and skip.name not in self._file_of:
                yield f"{skip.name}: missing"
        expected = {wanted.name for wanted in plan.reads} | {skip.name for skip in plan.skips}
        prefixes = tuple(skip.name[:-1] for skip in plan.skips if skip.name.endswith("*"))
        for name in self._file_of.keys() - expected:
            if not (prefixes and name.startswith(prefixes)):
                yield f"{name}: in {self._file_of[name].path.name}, but config.json describes no such tensor"

    def _read_faults(self, wanted: TensorRead) -> Iterator[str]:
        file = self._file_of.get(wanted.name)
        if file is None:
            what = "scales" if wanted.name.endswith(SCALE_SUFFIX) else "tensor"
            yield f"{wanted.name}: missing {what}, expected {wanted.dtype} {list(wanted.shape)}"
            return
        stored = file.tensors[wanted.name]
        if (stored.dtype, stored.shape) != (wanted.dtype, wanted.shape):
            yield (
                f"{wanted.name}: {stored.dtype} {list(stored.shape)} in {file.path.name}, "
                f"expected {wanted.dtype} {list(wanted.shape)}"
            )


def _read_index(model_dir: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if the directory holds a single file without an index."""
    path = model_dir / INDEX_NAME
    if not path.is_file():
        if (model_dir / SINGLE_NAME).is_file():
            return None
        raise CheckpointError(
            f"{path}: missing, and no {SINGLE_NAME} either; fetch the index and all its files"
        )
    try:
        weight_map = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error}") from error
    if not weight_map:
        raise CheckpointError(f"{path}: names no tensor")
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise CheckpointError(f"{path}: names the file {file_name!r}, which is not a plain file name")
        if not (model_dir / file_name).is_file():
            count = sum(1 for value in weight_map.values() if value == file_name)
            raise CheckpointError(
                f"{model_dir / file_name}: missing shard, {count} tensors of the index are in it; fetch it"
            )
    return weight_map


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _raise_faults(model_dir: Path, faults: Iterable[str]) -> None:
    listed = sorted(faults)
    if listed:
        rest = len(listed) - NUM_FAULTS_SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise CheckpointError(f"{model_dir}: " + "; ".join(listed[:NUM_FAULTS_SHOWN]) + more)
