"""A rank's fingerprint says what it is, the same each time, and crosses a process as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import torch
from k2kernels import KernelSet

from k2dist.engine.identity import fingerprint
from k2dist.parallel.fingerprint import Fingerprint, Introduction, differences

CPU = torch.device("cpu")


def test_a_fingerprint_crosses_a_process_and_is_the_same_each_time(tiny_model_dir: Path) -> None:
    one = fingerprint(tiny_model_dir, KernelSet.reference(torch.bfloat16), 2, CPU)
    assert msgspec.json.decode(msgspec.json.encode(one), type=Fingerprint) == one
    assert fingerprint(tiny_model_dir, KernelSet.reference(torch.bfloat16), 2, CPU) == one
    assert all(getattr(one, field) for field in Fingerprint.__struct_fields__)


def test_another_dtype_tp_or_model_is_another_fingerprint(tmp_path: Path, tiny_model_dir: Path) -> None:
    other_dir = tmp_path / "model"
    other_dir.mkdir()
    for name in ("config.json", "model.safetensors.index.json", "tiktoken.model"):
        shutil.copy(tiny_model_dir / name, other_dir)
    (other_dir / "config.json").write_text((other_dir / "config.json").read_text() + "\n")
    one = fingerprint(tiny_model_dir, KernelSet.reference(torch.bfloat16), 2, CPU)
    other = fingerprint(other_dir, KernelSet.reference(torch.float32), 4, CPU)
    pair = [
        Introduction(world_rank=rank, node="127.0.0.1", fingerprint=each)
        for rank, each in enumerate((one, other))
    ]
    assert [each.field for each in differences(pair)] == ["model", "dtype", "tp"]
