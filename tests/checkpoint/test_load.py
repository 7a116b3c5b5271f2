"""A rank reads its own bytes of a checkpoint and no others, and refuses one that is not what it should be."""

import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2dist.checkpoint import (
    CheckpointFiles,
    dequantise_block_fp8,
    load_shard,
    publish,
    random_tensors,
    safetensors_file,
    write_checkpoint,
)
from k2dist.checkpoint.safetensors_file import SafetensorsFile
from k2dist.config import Architecture
from k2dist.errors import CheckpointError
from k2dist.parallel import TensorRead, first_layout, leftover_tensors, published_tensors, shard_plan

INDEX = "model.safetensors.index.json"
LAST = "model-3-of-3.safetensors"
DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def weights(small: Architecture) -> dict[str, Tensor]:
    return random_tensors(small, seed=3)


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, small: Architecture, weights: dict[str, Tensor]
) -> Path:
    model_dir = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(model_dir, small, weights, with_inv_freq=True)
    return model_dir


@pytest.fixture
def copy(tmp_path: Path, pristine: Path) -> Path:
    """A copy of the checkpoint to be spoiled."""
    for path in pristine.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def bytes_of(tensor: Tensor) -> Tensor:
    """Float8 has no equality in torch."""
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def cut(tensor: Tensor, read: TensorRead) -> Tensor:
    rows = bytes_of(tensor)[read.row_start : read.row_stop]
    return rows if rows.ndim == 1 else rows[:, read.col_start : read.col_stop]


@pytest.mark.parametrize(("lanes", "tp", "alone"), [(1, 1, 0), (2, 1, 1), (1, 2, 1), (2, 2, 0), (1, 4, 0)])
def test_a_shard_is_the_slice_of_what_was_published(
    pristine: Path, small: Architecture, weights: dict[str, Tensor], lanes: int, tp: int, alone: int
) -> None:
    published = publish(small, weights)
    layout = first_layout(small, lanes=lanes, tp=tp, expert_only_ranks=alone)
    for rank in range(layout.world_size):
        plan = shard_plan(small, layout, rank)
        tensors = load_shard(pristine, plan)
        assert list(tensors) == [read.name for read in plan.reads]
        for read in plan.reads:
            assert tensors[read.name].dtype == published[read.name].dtype
            assert torch.equal(bytes_of(tensors[read.name]), cut(published[read.name], read)), read.name


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_slices_dequantise_to_slices_of_the_weights(
    pristine: Path, small: Architecture, weights: dict[str, Tensor], tp: int
) -> None:
    """Each slice dequantised by itself is the slice of the dequantised whole, and near the original."""
    published = publish(small, weights)
    layout = first_layout(small, lanes=1, tp=tp)
    for rank in range(tp):
        plan = shard_plan(small, layout, rank)
        tensors = load_shard(pristine, plan)
        linears = [read for read in plan.reads if read.dtype == "F8_E4M3"]
        assert linears
        for read in linears:
            scale = f"{read.name}_scale_inv"
            mine = dequantise_block_fp8(tensors[read.name], tensors[scale])
            assert torch.equal(mine, cut(dequantise_block_fp8(published[read.name], published[scale]), read))
            torch.testing.assert_close(mine, cut(weights[read.name], read), rtol=2.0**-4, atol=1e-3)


def test_the_files_open_with_the_safetensors_library(
    pristine: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    published = publish(small, weights)
    stored: dict[str, Tensor] = {}
    for path in pristine.glob("*.safetensors"):
        stored |= load_file(path)
    leftovers = {tensor.name for tensor in leftover_tensors(small)}
    assert stored.keys() == published.keys() | leftovers
    assert all(torch.equal(bytes_of(stored[name]), bytes_of(value)) for name, value in published.items())


def test_a_rank_reads_its_own_bytes_once(
    pristine: Path, small: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the file system after the headers is this rank's rectangles, each byte once."""
    asked: list[tuple[str, int, int]] = []

    class SpiedOs:
        def __getattr__(self, name: str) -> object:
            return self._preadv if name == "preadv" else getattr(os, name)

        def _preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
            asked.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, offset, len(buffers[0])))
            return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(safetensors_file, "os", SpiedOs())
    plan = shard_plan(small, first_layout(small, lanes=1, tp=2, expert_only_ranks=1), 1)
    with CheckpointFiles(pristine) as files:
        files.check(plan)
        num_in_data = sum(size for name, start, size in asked if start >= data_begin(pristine / name))
        assert num_in_data == 0, "opening and checking read headers only"
        asked.clear()
        files.read_all(plan)
        assert files.num_bytes_read == plan.num_bytes
    times_read = {path.name: numpy.zeros(path.stat().st_size) for path in pristine.glob("*.safetensors")}
    wanted = {name: numpy.zeros_like(times) for name, times in times_read.items()}
    for name, start, size in asked:
        times_read[name][start : start + size] += 1
    for read in plan.reads:
        name, runs = runs_in_file(pristine, read)
        for start, stop in runs:
            wanted[name][start:stop] += 1
    for name in wanted:
        assert wanted[name].max() == 1
        assert numpy.array_equal(times_read[name], wanted[name]), name


def data_begin(path: Path) -> int:
    with path.open("rb") as file:
        (num_header,) = struct.unpack("<Q", file.read(8))
    return 8 + int(num_header)


def runs_in_file(model_dir: Path, read: TensorRead) -> tuple[str, list[tuple[int, int]]]:
    """The file and byte runs, row by row, of a rectangle: worked out here as the format defines them."""
    file_name = json.loads((model_dir / INDEX).read_text())["weight_map"][read.name]
    origin = data_begin(model_dir / file_name)
    header = json.loads((model_dir / file_name).read_bytes()[8:origin])
    begin = origin + header[read.name]["data_offsets"][0]
    width = read.shape[1] if len(read.shape) == 2 else 1
    item = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[read.dtype]
    starts = [begin + (row * width + read.col_start) * item for row in range(read.row_start, read.row_stop)]
    return file_name, [(start, start + (read.col_stop - read.col_start) * item) for start in starts]


def test_no_tensor_keeps_more_than_its_own_bytes(pristine: Path, small: Architecture) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=4), 3)
    tensors = load_shard(pristine, plan)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) == plan.num_bytes


def test_progress_grows_to_the_whole(pristine: Path, small: Architecture) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=2), 0)
    seen: list[tuple[int, int]] = []
    load_shard(pristine, plan, lambda done, total: seen.append((done, total)))
    assert len(seen) == len(plan.reads)
    assert seen == sorted(seen)
    assert seen[-1] == (plan.num_bytes, plan.num_bytes)
    assert {total for _, total in seen} == {plan.num_bytes}


def test_a_fault_ends_the_reading_at_once(
    pristine: Path, small: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=1), 0)
    started: list[str] = []
    open_read = SafetensorsFile.open_read

    def open_slow_read(
        file: SafetensorsFile, wanted: Sequence[TensorRead], memory: Tensor
    ) -> tuple[dict[str, Tensor], Iterator[Callable[[], int]]]:
        tensors, pieces = open_read(file, wanted, memory)
        return tensors, (partial(slowly, fill, wanted[0].name) for fill in pieces)

    def slowly(fill: Callable[[], int], name: str) -> int:
        started.append(name)
        time.sleep(0.005)
        return fill()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsFile, "open_read", open_slow_read)
    with CheckpointFiles(pristine) as files, pytest.raises(KeyboardInterrupt):
        files.read_all(plan, stop)
    assert 1 <= len(started) < len(plan.reads) // 2


def test_a_single_file_needs_no_index(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    published = publish(small, weights)
    save_file(published, tmp_path / "model.safetensors")
    tensors = load_shard(tmp_path, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))
    assert tensors.keys() == published.keys()


def test_a_bfloat16_checkpoint_has_no_scales(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    plain = msgspec.structs.replace(small, scale_block=None)
    write_checkpoint(tmp_path, plain, weights)
    layout = first_layout(plain, lanes=1, tp=8)
    plan = shard_plan(plain, layout, 5)
    tensors = load_shard(tmp_path, plan)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    for read in plan.reads:
        assert torch.equal(tensors[read.name], cut(weights[read.name].to(tensors[read.name].dtype), read))


def test_the_mtp_layer_of_deepseek_v3_is_passed_over(copy: Path, small: Architecture) -> None:
    add(
        copy,
        {"model.layers.3.eh_proj.weight": torch.zeros(4, 8), "model.layers.3.enorm.weight": torch.zeros(4)},
    )
    v3 = msgspec.structs.replace(small, num_mtp_layers=1)
    tensors = load_shard(copy, shard_plan(v3, first_layout(v3, lanes=1, tp=1), 0))
    assert tensors.keys() == {tensor.name for tensor in published_tensors(small)}
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight: in .* no such tensor"):
        load_shard(copy, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))


# -- checkpoints that are refused ----------------------------------------------------------------------


def rewrite(model_dir: Path, file_name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of one file, and the index with them."""
    tensors = load_file(model_dir / file_name)
    before = set(tensors)
    change(tensors)
    save_file(tensors, model_dir / file_name)
    index = json.loads((model_dir / INDEX).read_text())
    for name in before - tensors.keys():
        del index["weight_map"][name]
    index["weight_map"].update(dict.fromkeys(tensors, file_name))
    (model_dir / INDEX).write_text(json.dumps(index))


def add(model_dir: Path, extra: dict[str, Tensor], file_name: str = LAST) -> None:
    rewrite(model_dir, file_name, lambda tensors: tensors.update(extra))


def edit_index(model_dir: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((model_dir / INDEX).read_text())
    change(index["weight_map"])
    (model_dir / INDEX).write_text(json.dumps(index))


def truncate(model_dir: Path, file_name: str, num_bytes: int) -> None:
    os.truncate(model_dir / file_name, (model_dir / file_name).stat().st_size + num_bytes)


def set_header(
    model_dir: Path, file_name: str, change: Callable[[dict[str, dict[str, object]]], None]
) -> None:
    """Edit a header in place; the data stays."""
    data = (model_dir / file_name).read_bytes()
    (num_header,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + num_header])
    change(header)
    text = json.dumps(header).encode()
    (model_dir / file_name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + num_header :])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda d: rewrite(d, LAST, lambda t: t.pop("model.norm.weight")),
        r"model\.norm\.weight: missing tensor, expected BF16 \[256\]",
    ),
    "missing scales": (
        lambda d: rewrite(d, LAST, lambda t: t.pop(f"{DOWN}_scale_inv")),
        r"experts\.5\.down_proj\.weight_scale_inv: missing scales, expected F32 \[2, 1\]",
    ),
    "extra tensor": (
        lambda d: add(d, {"model.layers.2.self_attn.q_proj.weight": torch.zeros(2, 2)}),
        rf"self_attn\.q_proj\.weight: in {LAST}, but config\.json describes no such tensor",
    ),
    "mis-shaped tensor": (
        lambda d: add(d, {"model.norm.weight": torch.zeros(128, dtype=torch.bfloat16)}),
        rf"model\.norm\.weight: BF16 \[128\] in {LAST}, expected BF16 \[256\]",
    ),
    "floored scales of kv_a": (
        lambda d: add(d, {"model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv": torch.ones(1, 2)}),
        rf"kv_a_proj_with_mqa\.weight_scale_inv: F32 \[1, 2\] in {LAST}, expected F32 \[2, 2\]",
    ),
    "wrong dtype": (
        lambda d: add(d, {DOWN: torch.zeros(256, 128, dtype=torch.bfloat16)}),
        rf"down_proj\.weight: BF16 \[256, 128\] in {LAST}, expected F8_E4M3 \[256, 128\]",
    ),
    "missing shard": (
        lambda d: (d / LAST).unlink(),
        rf"{LAST}: missing shard, \d+ tensors of the index are in it",
    ),
    "truncated file": (
        lambda d: truncate(d, LAST, -1000),
        rf"{LAST}: truncated: [\d,]+ bytes, expected [\d,]+",
    ),
    "file cut inside its header": (
        lambda d: os.truncate(d / LAST, 100),
        rf"{LAST}: truncated or not safetensors: its header should have",
    ),
    "empty file": (
        lambda d: os.truncate(d / LAST, 0),
        rf"{LAST}: 0 bytes, too short",
    ),
    "file with a tail": (
        lambda d: truncate(d, LAST, 8),
        rf"{LAST}: longer than its header says",
    ),
    "header that is not JSON": (
        lambda d: (d / LAST).write_bytes(struct.pack("<Q", 4) + b"\x00abc"),
        rf"{LAST}: header is not safetensors",
    ),
    "gap in the data": (
        lambda d: set_header(d, LAST, lambda h: h.pop("model.norm.weight")),
        rf"{LAST}: .* expected to begin at",
    ),
    "shape that its bytes contradict": (
        lambda d: set_header(d, LAST, lambda h: h["model.norm.weight"].update(shape=[255])),
        rf"{LAST}: model\.norm\.weight: 512 bytes, but BF16 \[255\] has 510",
    ),
    "no index": (
        lambda d: (d / INDEX).unlink(),
        rf"{INDEX}: missing, and no model\.safetensors either",
    ),
    "index that is not JSON": (
        lambda d: (d / INDEX).write_text("{"),
        rf"{INDEX}: not an index",
    ),
    "index without names": (
        lambda d: (d / INDEX).write_text('{"weight_map": {}}'),
        "names no tensor",
    ),
    "index that points elsewhere": (
        lambda d: edit_index(d, lambda m: m.update({DOWN: "../other.safetensors"})),
        r"'\.\./other\.safetensors', which is not a plain file name",
    ),
    "index with the wrong file": (
        lambda d: edit_index(d, lambda m: m.update({DOWN: "model-1-of-3.safetensors"})),
        rf"{DOWN}: the index says it is in model-1-of-3\.safetensors, found in {LAST}",
    ),
    "index with a name that no file has": (
        lambda d: edit_index(d, lambda m: m.update({"model.lost": LAST})),
        rf"model\.lost: the index says it is in {LAST}, in no file",
    ),
    "tensor not in the index": (
        lambda d: edit_index(d, lambda m: m.pop(DOWN)),
        rf"{DOWN}: in {LAST} but not in the index",
    ),
    "tensor in two files": (
        lambda d: add(d, {"model.embed_tokens.weight": torch.zeros(1)}),
        rf"model\.embed_tokens\.weight: in both model-1-of-3\.safetensors and {LAST}",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_refused_by_what_is_wrong(copy: Path, small: Architecture, name: str) -> None:
    spoil, message = SPOILED[name]
    plan = shard_plan(small, first_layout(small, lanes=1, tp=1), 0)
    load_shard(copy, plan)
    spoil(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_shard(copy, plan)
    assert len(str(caught.value).splitlines()) == 1


def test_a_rank_notices_what_only_others_read(copy: Path, small: Architecture) -> None:
    rewrite(copy, LAST, lambda tensors: tensors.pop(DOWN))
    plan = shard_plan(small, first_layout(small, lanes=4, tp=1), 0)
    assert DOWN in {skip.name for skip in plan.skips}
    with pytest.raises(CheckpointError, match=f"{DOWN}: missing"):
        load_shard(copy, plan)


def test_many_faults_are_counted(copy: Path, small: Architecture) -> None:
    rewrite(copy, LAST, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    with pytest.raises(CheckpointError, match=r"missing tensor.*; and 67 more$"):
        load_shard(copy, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))


def test_a_file_that_shrinks_while_it_is_read_is_noticed(copy: Path, small: Architecture) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=1), 0)
    with CheckpointFiles(copy) as files:
        files.check(plan)
        truncate(copy, LAST, -100_000)
        with pytest.raises(CheckpointError, match=rf"{LAST}: .*: the file ends at byte"):
            files.read_all(plan)


def test_no_file_stays_open(pristine: Path, copy: Path, small: Architecture) -> None:
    before = len(os.listdir("/proc/self/fd"))
    plan = shard_plan(small, first_layout(small, lanes=1, tp=1), 0)
    load_shard(pristine, plan)
    truncate(copy, LAST, -1000)
    with pytest.raises(CheckpointError):
        load_shard(copy, plan)
    assert len(os.listdir("/proc/self/fd")) == before
