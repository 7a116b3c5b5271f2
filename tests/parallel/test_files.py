"""The files of a checkpoint are known to the byte before they are written; K2's are as published."""

import json
import struct
from pathlib import Path

import pytest

from k2dist.checkpoint import random_tensors, write_checkpoint
from k2dist.config import Architecture
from k2dist.parallel import FileMap, StoredTensor, file_maps, leftover_tensors, published_tensors


@pytest.mark.parametrize(
    ("shards", "padded_names", "with_inv_freq"), [(None, False, True), (2, True, False), (1, False, False)]
)
def test_files_are_where_the_writer_puts_them(
    tmp_path: Path, small: Architecture, shards: int | None, padded_names: bool, with_inv_freq: bool
) -> None:
    write_checkpoint(
        tmp_path,
        small,
        random_tensors(small, seed=2),
        shards=shards,
        padded_names=padded_names,
        with_inv_freq=with_inv_freq,
    )
    planned = list(file_maps(small, shards=shards, padded_names=padded_names, with_inv_freq=with_inv_freq))
    assert {file.name for file in planned} == {path.name for path in tmp_path.glob("*.safetensors")}
    for file in planned:
        assert file == written(tmp_path / file.name)


def written(path: Path) -> FileMap:
    """The map of a file as its own header says it."""
    data = path.read_bytes()
    (json_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + json_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    begin = 8 + json_bytes
    tensors = {
        name: StoredTensor(
            entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
        )
        for name, entry in header.items()
    }
    return FileMap(path.name, begin, len(data), tensors)


def test_planned_tensors_are_in_the_order_of_their_bytes(small: Architecture) -> None:
    for file in file_maps(small):
        begins = [stored.begin for stored in file.tensors.values()]
        assert begins == sorted(begins)


@pytest.fixture(scope="module")
def k2_files(k2: Architecture) -> list[FileMap]:
    return list(file_maps(k2, with_inv_freq=True))


def test_all_tensors_of_k2_lie_in_its_files_without_a_gap(k2: Architecture, k2_files: list[FileMap]) -> None:
    """139,644 tensors and 1,029,173,256,720 bytes in 61 files (k2_facts 3)."""
    published = {tensor.name: tensor for tensor in (*published_tensors(k2), *leftover_tensors(k2))}
    assert len(published) == sum(len(file.tensors) for file in k2_files) == 139_644
    for file in k2_files:
        position = file.header_bytes
        for name, stored in file.tensors.items():
            tensor = published.pop(name)
            assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
            assert (stored.begin, stored.end) == (position, position + tensor.num_bytes)
            position = stored.end
        assert position == file.num_bytes
    assert not published
    assert sum(file.num_bytes - file.header_bytes for file in k2_files) == 1_029_173_256_720
    assert round(sum(file.num_bytes for file in k2_files) / 2**30, 2) == 958.51


def test_k2_has_a_file_per_layer_with_the_ends_in_the_first_and_last(k2_files: list[FileMap]) -> None:
    assert [file.name for file in k2_files] == [f"model-{n}-of-61.safetensors" for n in range(1, 62)]
    for layer, file in enumerate(k2_files):
        ends = {name for name in file.tensors if not name.startswith(f"model.layers.{layer}.")}
        assert ends == {
            0: {"model.embed_tokens.weight"},
            60: {"model.norm.weight", "lm_head.weight"},
        }.get(layer, set())


def test_k2_has_the_elements_that_are_published(k2_files: list[FileMap]) -> None:
    """By dtype, k2_facts 3."""
    elements = {"F8_E4M3": 0, "BF16": 0, "F32": 0}
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    for file in k2_files:
        for stored in file.tensors.values():
            elements[stored.dtype] += (stored.end - stored.begin) // sizes[stored.dtype]
    assert elements == {"F8_E4M3": 1_023_893_241_856, "BF16": 2_514_970_968, "F32": 62_518_232}
