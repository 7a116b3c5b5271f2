"""Cold reads: each rank its own bytes, in a process of its own; what it cannot read, it says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from k2dist.bench.load import measure, num_reads
from k2dist.config import read_architecture
from k2dist.errors import CheckpointError
from k2dist.parallel import first_layout, shard_plans
from k2dist.probe.disk import READERS, cached_share, evict


def plans_of(model_dir: Path, tp: int):
    architecture = read_architecture(model_dir)
    return list(shard_plans(architecture, first_layout(architecture, lanes=1, tp=tp)))


def on_disk(model_dir: Path) -> list[Path]:
    """Its files, written out: what is not cannot be dropped from the cache."""
    files = sorted(model_dir.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    evict(files)
    if cached_share(files) > 0:
        pytest.skip("a file system in memory has no cold reads")
    return files


def test_ranks_read_their_shards_from_the_disk(tiny_model_dir: Path) -> None:
    files = on_disk(tiny_model_dir)
    plans = plans_of(tiny_model_dir, tp=2)
    noted: list[None] = []
    rates = measure(tiny_model_dir, plans, num_rounds=1, note=lambda: noted.append(None))
    assert rates.num_ranks == 2
    assert len(noted) == num_reads(1)
    assert rates.ceiling_reader in map(str, READERS)
    assert rates.num_bytes == sum(plan.num_bytes for plan in plans)
    assert rates.file_bytes == sum(path.stat().st_size for path in files)
    assert 0 < rates.disk_bytes <= 2 * rates.file_bytes
    assert rates.cached_share == 0.0
    assert rates.share > 0


def test_a_file_that_is_cut_short_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    plans = plans_of(model_dir, tp=1)
    shard = on_disk(model_dir)[0]
    os.truncate(shard, shard.stat().st_size - 16)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
        measure(model_dir, plans, num_rounds=1)


def test_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file in it"):
        measure(tmp_path, [], num_rounds=1)
