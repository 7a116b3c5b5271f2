"""Checksums: every legal slice can be checked, what differs is named, and K2's list stays small."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2dist.checkpoint import load_shard, random_tensors, write_checkpoint
from k2dist.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestChecker,
    digests,
    find_checker,
    num_parts,
    read_manifest,
    value_faults,
    write_manifest,
)
from k2dist.checkpoint.survey import survey
from k2dist.config import Architecture, read_architecture
from k2dist.errors import CapacityError, CheckpointError
from k2dist.parallel import Share, first_layout, legal_tp, published_tensors, shard_plan

K2_DIR = Path(__file__).parents[1] / "config" / "data" / "kimi-k2-instruct"
Q_B = "model.layers.1.self_attn.q_b_proj.weight"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, small: Architecture) -> Path:
    model_dir = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(model_dir, small, random_tensors(small, seed=9), with_inv_freq=True)
    return model_dir


@pytest.fixture(scope="module")
def manifest(model_dir: Path, small: Architecture) -> Manifest:
    return survey(model_dir, small).manifest


@pytest.fixture(scope="module")
def checker(manifest: Manifest, small: Architecture) -> ManifestChecker:
    return ManifestChecker(manifest, small, "manifest")


def rank_faults(
    checker: ManifestChecker, tensors: dict[str, Tensor], small: Architecture, tp: int, rank: int
) -> list[str]:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=tp), rank)
    return [fault for read in plan.reads for fault in checker.faults(read, tensors[read.name])]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_slice_of_every_legal_tp_is_right(
    model_dir: Path, small: Architecture, checker: ManifestChecker, tp: int
) -> None:
    layout = first_layout(small, lanes=1, tp=tp)
    for rank in range(tp):
        tensors = load_shard(model_dir, shard_plan(small, layout, rank))
        assert rank_faults(checker, tensors, small, tp, rank) == []


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_flipped_bit_anywhere_is_found_by_the_rank_that_holds_it(
    model_dir: Path, small: Architecture, checker: ManifestChecker, tp: int
) -> None:
    """One tensor of each share and dtype; the other ranks' slices stay right."""
    layout = first_layout(small, lanes=1, tp=tp)
    plan = shard_plan(small, layout, tp - 1)
    tensors = load_shard(model_dir, plan)
    seen = set()
    for read in plan.reads:
        kind = (read.dtype, read.cut_shape == read.shape, len(read.shape))
        if kind in seen:
            continue
        seen.add(kind)
        data = tensors[read.name].view(torch.uint8).view(-1)
        data[-1] ^= 1
        (fault,) = rank_faults(checker, tensors, small, tp, tp - 1)
        assert fault.startswith(read.name)
        data[-1] ^= 1
    assert len(seen) >= 5
    assert rank_faults(checker, tensors, small, tp, tp - 1) == []


def test_where_a_slice_differs_is_told_in_rows_and_columns_of_the_tensor(
    model_dir: Path, small: Architecture, checker: ManifestChecker
) -> None:
    tensors = load_shard(model_dir, shard_plan(small, first_layout(small, lanes=1, tp=2), 1))
    tensors[Q_B].view(torch.uint8)[383, 0] ^= 1  # row 768 + 383 of 1536, in parts of 384
    o_proj = "model.layers.1.self_attn.o_proj.weight"
    tensors[o_proj].view(torch.uint8)[0, 256] ^= 1  # column 512 + 256 of 1024, in parts of 256
    assert rank_faults(checker, tensors, small, 2, 1) == [
        f"{Q_B}, rows 768 to 1151: its bytes are not those of the manifest",
        f"{o_proj}, columns 768 to 1023: its bytes are not those of the manifest",
    ]


def test_bytes_of_another_tensor_are_recognised(
    model_dir: Path, small: Architecture, checker: ManifestChecker
) -> None:
    tensors = load_shard(model_dir, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))
    one, other = (f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (3, 8))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    assert rank_faults(checker, tensors, small, 1, 0) == [
        f"{one}: holds the bytes of {other}",
        f"{other}: holds the bytes of {one}",
    ]


def test_a_digest_is_the_files_bytes_in_blake2b(model_dir: Path, manifest: Manifest) -> None:
    stored = load_file(model_dir / "model-2-of-3.safetensors")
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    whole = stored[name].view(torch.uint8).numpy().tobytes()
    assert manifest.digests[name] == (hashlib.blake2b(whole, digest_size=16).hexdigest(),)
    rows = stored[Q_B].view(torch.uint8)[384:768].numpy().tobytes()
    assert manifest.digests[Q_B][1] == hashlib.blake2b(rows, digest_size=16).hexdigest()


def test_a_survey_reads_parts_as_it_would_the_whole(
    model_dir: Path, small: Architecture, manifest: Manifest
) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=1), 0)
    tensors = load_shard(model_dir, plan)
    for tensor in published_tensors(small):
        assert manifest.digests[tensor.name] == digests(tensors[tensor.name], tensor.share, 4), tensor.name


def test_a_survey_tells_how_far_it_is(model_dir: Path, small: Architecture) -> None:
    told: list[tuple[int, int]] = []
    found = survey(model_dir, small, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (found.num_bytes, found.num_bytes)
    assert found.num_bytes == sum(tensor.num_bytes for tensor in published_tensors(small))
    assert found.faults == []


# Tensor, where, what is put there, and what is said of it.
VALUE_FAULTS: list[tuple[str, tuple[int, ...], float, str]] = [
    (Q_B, (700, 5), math.nan, "nan at [700, 5], should be finite"),
    (
        "model.layers.2.mlp.experts.1.up_proj.weight_scale_inv",
        (0, 1),
        0.0,
        "0.0 at [0, 1], should be finite and positive",
    ),
    (
        "model.layers.2.mlp.shared_experts.down_proj.weight_scale_inv",
        (1, 1),
        math.inf,
        "inf at [1, 1], should be finite and positive",
    ),
    ("lm_head.weight", (511, 0), -math.inf, "-inf at [511, 0], should be finite"),
    (
        "model.layers.2.mlp.gate.e_score_correction_bias",
        (11,),
        math.nan,
        "nan at [11], should be finite",
    ),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), VALUE_FAULTS)
def test_a_value_that_no_weight_has_is_named(
    model_dir: Path,
    tmp_path: Path,
    small: Architecture,
    name: str,
    place: tuple[int, ...],
    value: float,
    message: str,
) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    (path,) = (p for p in tmp_path.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    tensors[name][place] = value
    save_file(tensors, path, metadata={"format": "pt"})
    assert survey(tmp_path, small).faults == [f"{name}: {message}"]


@pytest.mark.parametrize(("byte", "is_fault"), [(0x7F, True), (0xFF, True), (0x7E, False), (0xFE, False)])
def test_both_nan_of_e4m3_count_and_448_does_not(byte: int, is_fault: bool) -> None:
    q = torch.tensor([[0, byte]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = ["w: nan at [0, 1], should be finite"] if is_fault else []
    assert list(value_faults("w", q, is_scale=False)) == expected


# -- the file ------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_and_has_a_line_per_tensor(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / MANIFEST_NAME
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest
    assert len(path.read_text().splitlines()) == len(manifest.digests)
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_manifest_that_cannot_be_written_says_so(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(CapacityError, match="cannot write"):
        write_manifest(tmp_path / "absent" / MANIFEST_NAME, manifest)


def test_no_manifest_is_no_fault(tmp_path: Path, small: Architecture) -> None:
    assert find_checker(tmp_path, small) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no manifest \(Input data was truncated\)"),
        ('{"num_parts": 4}', "no manifest .*digests"),
        ('{"format": "x", "num_parts": 4, "digests": {}}', "format='x', this k2dist reads"),
        ('{"num_parts": 4, "digests": {}}', r"not of this model \(.*: in one of manifest and model only"),
    ],
)
def test_a_file_that_is_no_manifest_of_this_model_is_refused(
    tmp_path: Path, small: Architecture, text: str, message: str
) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        find_checker(tmp_path, small)


def test_other_parts_are_refused(manifest: Manifest, small: Architecture) -> None:
    fewer = msgspec.structs.replace(manifest, num_parts=2)
    with pytest.raises(CheckpointError, match="num_parts=2, this model has 4"):
        ManifestChecker(fewer, small, "manifest")
    cut = msgspec.structs.replace(manifest, digests={**manifest.digests, Q_B: ("00",)})
    with pytest.raises(CheckpointError, match=f"{Q_B}: 1 digests"):
        ManifestChecker(cut, small, "manifest")


# -- Kimi-K2-Instruct ----------------------------------------------------------------------------------------


def test_k2s_manifest_is_compact_and_fits_every_legal_slice() -> None:
    k2 = read_architecture(K2_DIR)
    parts = num_parts(k2)
    assert (legal_tp(k2), parts) == ((1, 2, 4, 8, 16), 16)
    entries: dict[str, tuple[str, ...]] = {}
    for tensor in published_tensors(k2):
        is_sliced = tensor.share in (Share.ROWS, Share.COLUMNS)
        entries[tensor.name] = ("0" * 32,) * (parts if is_sliced else 1)
        if is_sliced:
            width = tensor.shape[0 if tensor.share is Share.ROWS else 1]
            for tp in legal_tp(k2):
                assert width % tp == 0, "a slice is whole"
                assert (width // tp) % (width // parts) == 0, "and made of whole parts"
    listed = Manifest(num_parts=parts, digests=entries)
    ManifestChecker(listed, k2, "k2")
    assert len(entries) == 139_583
    assert sum(map(len, entries.values())) < 150_000
    assert len(msgspec.json.encode(listed)) < 14e6, "of 1.03 TB"
