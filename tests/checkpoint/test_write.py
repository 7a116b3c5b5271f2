"""A checkpoint is written in the published form, whole or not at all."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from k2dist.checkpoint import load_shard, publish, random_tensors, write_checkpoint
from k2dist.config import Architecture
from k2dist.errors import CapacityError, CheckpointError
from k2dist.parallel import first_layout, shard_plan

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def weights(small: Architecture) -> dict[str, Tensor]:
    return random_tensors(small, seed=4)


def files_in(model_dir: Path) -> list[str]:
    return sorted(path.name for path in model_dir.iterdir())


def test_one_layer_per_file_as_k2_publishes(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    write_checkpoint(tmp_path, small, weights, with_inv_freq=True)
    assert files_in(tmp_path) == [*(f"model-{n}-of-3.safetensors" for n in (1, 2, 3)), INDEX]
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for name, file_name in weight_map.items():
        if name.startswith("model.layers."):
            assert file_name == f"model-{int(name.split('.')[2]) + 1}-of-3.safetensors"
    assert weight_map["model.embed_tokens.weight"] == "model-1-of-3.safetensors"
    assert weight_map["model.norm.weight"] == weight_map["lm_head.weight"] == "model-3-of-3.safetensors"


def test_the_index_counts_the_bytes(tmp_path: Path, small: Architecture, weights: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, small, weights)
    metadata = json.loads((tmp_path / INDEX).read_text())["metadata"]
    assert metadata["total_size"] == sum(value.nbytes for value in publish(small, weights).values())


def test_dtypes_are_as_published(tmp_path: Path, small: Architecture, weights: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, small, weights, shards=1)
    stored = load_file(tmp_path / "model-1-of-1.safetensors")
    for name, value in stored.items():
        if name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert value.dtype == torch.float32, name
        elif "_proj" in name:
            assert value.dtype == torch.float8_e4m3fn, name
        else:
            assert value.dtype == torch.bfloat16, name
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(stored[bias], weights[bias]), "the correction bias is not rounded"


def test_padded_names_are_those_of_0905(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    write_checkpoint(tmp_path, small, weights, shards=2, padded_names=True)
    assert files_in(tmp_path) == [f"model-0000{n}-of-000002.safetensors" for n in (1, 2)] + [INDEX]
    load_shard(tmp_path, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))


def test_leftover_inv_freq_is_written_and_skipped(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    write_checkpoint(tmp_path, small, weights, with_inv_freq=True)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    stored = load_file(tmp_path / "model-2-of-3.safetensors")[name]
    assert (stored.dtype, tuple(stored.shape)) == (torch.bfloat16, (16,))
    assert name not in load_shard(tmp_path, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))


def test_files_can_be_read_by_others(tmp_path: Path, small: Architecture, weights: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, small, weights)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.iterdir())


def test_writing_again_replaces(tmp_path: Path, small: Architecture, weights: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, small, weights)
    others = random_tensors(small, seed=5)
    write_checkpoint(tmp_path, small, others)
    tensors = load_shard(tmp_path, shard_plan(small, first_layout(small, lanes=1, tp=1), 0))
    assert torch.equal(tensors["lm_head.weight"], others["lm_head.weight"].bfloat16())


@pytest.mark.parametrize("shards", [0, 4])
def test_at_most_one_file_per_layer(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor], shards: int
) -> None:
    with pytest.raises(ValueError, match=f"shards={shards}: use 1 to 3"):
        write_checkpoint(tmp_path, small, weights, shards=shards)


def test_faulty_tensors_are_refused_before_anything_is_written(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    faulty = {**weights, "model.extra": torch.zeros(1), "model.norm.weight": torch.zeros(3)}
    del faulty["lm_head.weight"]
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path, small, faulty)
    assert str(caught.value) == (
        "cannot write a checkpoint, 3 faults: lm_head.weight: missing; "
        "model.extra: not a tensor of this architecture; model.norm.weight: shape [3], expected [256]"
    )
    assert files_in(tmp_path) == []


def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: .* NaN or infinity"):
        write_checkpoint(tmp_path, small, {**weights, name: weights[name] * float("nan")})


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """Files end at 1,600,000 bytes, as on a full disk: the first shard fits, the second does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_600_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("no_large_files")
def test_a_full_disk_leaves_no_part_and_no_index(
    tmp_path: Path, small: Architecture, weights: dict[str, Tensor]
) -> None:
    (tmp_path / INDEX).write_text("of an older checkpoint")
    with pytest.raises(CapacityError, match=r"cannot write .*model-2-of-3\.safetensors \([\d,]+ bytes\)"):
        write_checkpoint(tmp_path, small, weights)
    assert files_in(tmp_path) == ["model-1-of-3.safetensors"]


def test_random_weights_are_a_function_of_their_seed(small: Architecture) -> None:
    first, again, other = (random_tensors(small, seed) for seed in (7, 7, 8))
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_an_unquantised_model_publishes_bfloat16(small: Architecture, weights: dict[str, Tensor]) -> None:
    plain = publish(msgspec.structs.replace(small, scale_block=None), weights)
    assert plain.keys() == weights.keys()
    assert {value.dtype for value in plain.values()} == {torch.bfloat16, torch.float32}
