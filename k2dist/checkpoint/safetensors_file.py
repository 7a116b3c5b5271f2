"""One safetensors file: its header, checked, and reads of rectangles of its tensors.

    8 bytes, little endian   N bytes of JSON                                       the tensors, without a gap
    N                        {name: {dtype, shape, data_offsets: [begin, end]}}    offsets count from here

Only the header and the asked-for bytes are read; nothing is mapped: a rank holds what it asked for, and page
faults of one thread read a cold disk of 1.0 GB/s at 0.2 (`safe_open` over 1.37 GB; 8 threads of reads: 1.0).
Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import msgspec
import torch
from torch import Tensor

from k2dist.errors import CheckpointError
from k2dist.parallel.files import StoredTensor
from k2dist.parallel.published import DTYPE_BYTES
from k2dist.parallel.shard_plan import ByteRuns, TensorRead

TORCH_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}
PIECE_BYTES = 16 * 2**20  # of one call to the file system: large enough for disks, small enough for progress
HEADER_BYTES_MAX = 100_000_000  # the format's own bound; K2's largest header has about 400,000


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """An open file with its header read. Reads may come from several threads; `close` when done."""

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` if the file is missing, cut short or not safetensors."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; fetch this file again") from error
        try:
            self.header_bytes, self.num_bytes, self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def read(self, wanted: TensorRead) -> Tensor:
        """The rectangle, as a CPU tensor that owns just its bytes. No byte outside it is read."""
        tensors, pieces = self.open_read([wanted], torch.empty(wanted.num_bytes, dtype=torch.uint8))
        for fill in pieces:
            fill()
        return tensors[wanted.name]

    def extent(self, wanted: TensorRead) -> tuple[int, int] | None:
        """Bytes [begin, end) of the file that are the rectangle; None: it lies in many pieces."""
        return self._span(wanted) if wanted.runs.num_runs == 1 else None

    def fetch(self, first: TensorRead, last: TensorRead) -> None:
        """Hint that the bytes from one rectangle to the end of another will be read."""
        begin, end = self._span(first)[0], self._span(last)[1]
        os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _span(self, wanted: TensorRead) -> tuple[int, int]:
        """Bytes [begin, end) from the first of the rectangle to its last."""
        runs = wanted.runs
        begin = self.tensors[wanted.name].begin + runs.first
        return begin, begin + (runs.num_runs - 1) * runs.stride + runs.run_bytes

    def open_read(
        self, wanted: Sequence[TensorRead], memory: Tensor
    ) -> tuple[dict[str, Tensor], Iterator[Callable[[], int]]]:
        """Rectangles in `memory`, uint8 of their bytes, and calls that fill it, in any order and thread.

        One rectangle, or several of which each begins where the last one's `extent` ends. Each call returns
        the bytes that it has read: about `PIECE_BYTES`. Together they read every byte once.
        """
        tensors: dict[str, Tensor] = {}
        place = 0
        for each in wanted:
            part = memory[place : place + each.num_bytes]
            tensors[each.name] = part.view(TORCH_DTYPES[each.dtype]).view(each.cut_shape)
            place += each.num_bytes
        return tensors, self._pieces(memory.numpy().data, wanted)

    def _pieces(self, target: memoryview, wanted: Sequence[TensorRead]) -> Iterator[Callable[[], int]]:
        name, runs, begin = wanted[0].name, wanted[0].runs, self.tensors[wanted[0].name].begin
        if runs.num_runs == 1:
            what = name if len(wanted) == 1 else f"{name} to {wanted[-1].name}"
            for start in range(0, len(target), PIECE_BYTES):
                part = target[start : start + PIECE_BYTES]
                yield partial(self._fill_run, part, begin + runs.first + start, what)
            return
        step = max(PIECE_BYTES // runs.stride, 1)  # a piece by its span in the file, as a disk sees it
        for start in range(0, runs.num_runs, step):
            rows = range(start, min(start + step, runs.num_runs))
            yield partial(self._fill_rows, target, begin, name, runs, rows)

    def _fill_run(self, target: memoryview, offset: int, name: str) -> int:
        self._fill(target, offset, name)
        return len(target)

    def _fill_rows(self, target: memoryview, begin: int, name: str, runs: ByteRuns, rows: range) -> int:
        for row in rows:
            part = target[row * runs.run_bytes : (row + 1) * runs.run_bytes]
            self._fill(part, begin + runs.first + row * runs.stride, name)
        return len(rows) * runs.run_bytes

    def _read_header(self) -> tuple[int, int, dict[str, StoredTensor]]:
        file_bytes = os.fstat(self._fd).st_size
        if file_bytes < 8:
            raise CheckpointError(
                f"{self.path}: {file_bytes} bytes, too short for safetensors; fetch it again"
            )
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0, "header")
        (json_bytes,) = struct.unpack("<Q", prefix)
        if json_bytes > min(file_bytes - 8, HEADER_BYTES_MAX):
            raise CheckpointError(
                f"{self.path}: truncated or not safetensors: its header should have {json_bytes:,} bytes, "
                f"the file has {file_bytes:,}; fetch it again"
            )
        text = bytearray(json_bytes)
        self._fill(memoryview(text), 8, "header")
        tensors = self._parse(bytes(text), 8 + json_bytes)
        end = max((tensor.end for tensor in tensors.values()), default=8 + json_bytes)
        if end != file_bytes:
            fault = "truncated" if file_bytes < end else "longer than its header says"
            raise CheckpointError(
                f"{self.path}: {fault}: {file_bytes:,} bytes, expected {end:,}; fetch it again"
            )
        return 8 + json_bytes, file_bytes, tensors

    def _parse(self, text: bytes, data_begin: int) -> dict[str, StoredTensor]:
        try:
            raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            raw.pop("__metadata__", None)
            decode = msgspec.json.Decoder(_Entry).decode
            entries = {name: decode(value) for name, value in raw.items()}
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{self.path}: header is not safetensors: {error}") from error
        expected_begin = 0
        tensors: dict[str, StoredTensor] = {}
        for name, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
            begin, end = entry.data_offsets
            if begin != expected_begin or end < begin:
                raise CheckpointError(
                    f"{self.path}: {name}: bytes [{begin}, {end}), expected to begin at {expected_begin}"
                )
            expected_begin = end
            self._check_extent(name, entry)
            tensors[name] = StoredTensor(entry.dtype, entry.shape, data_begin + begin, data_begin + end)
        return tensors

    def _check_extent(self, name: str, entry: _Entry) -> None:
        """For dtypes that k2dist reads; other tensors are passed over or refused by name."""
        if entry.dtype not in DTYPE_BYTES:
            return
        num_bytes = DTYPE_BYTES[entry.dtype]
        for size in entry.shape:
            num_bytes *= size
        begin, end = entry.data_offsets
        if end - begin != num_bytes:
            raise CheckpointError(
                f"{self.path}: {name}: {end - begin:,} bytes, but {entry.dtype} {list(entry.shape)} "
                f"has {num_bytes:,}"
            )

    def _fill(self, target: memoryview, offset: int, what: str) -> None:
        """Read until `target` is full; one call moves at most 2 GiB on Linux."""
        while len(target):
            try:
                count = os.preadv(self._fd, [target], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {what}: cannot read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: {what}: the file ends at byte {offset:,}; fetch it again"
                )
            target = target[count:]
            offset += count
