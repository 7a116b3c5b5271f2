"""Memory for one part of a checkpoint after another: used again, and never under somebody who holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2dist.checkpoint import CheckpointFiles, ReadMemory
from k2dist.checkpoint.safetensors_file import SafetensorsFile
from k2dist.config import read_architecture
from k2dist.parallel import first_layout, shard_plan


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = ReadMemory()
    first = memory.take(4096)
    place, part = first.data_ptr(), first[64:128].view(torch.float32)
    del first
    assert memory.take(1024).data_ptr() != place, "a part of it is held"
    del part
    assert memory.take(1024).data_ptr() == place


def test_a_block_that_is_too_small_goes() -> None:
    memory = ReadMemory()
    memory.take(64)
    large = memory.take(4096)
    assert len(large) == 4096
    place = large.data_ptr()
    del large
    assert memory.take(64).data_ptr() == place


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_shared_memory_gives_the_same_tensors(
    tiny_model_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns and whole tensors; what follows one another in a file is read in one go."""
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=2, expert_only_ranks=1)
    plan = shard_plan(read_architecture(tiny_model_dir), layout, rank)
    opened: list[int] = []
    open_read = SafetensorsFile.open_read

    def counted(file, wanted, memory):  # type: ignore[no-untyped-def]
        opened.append(len(wanted))
        return open_read(file, wanted, memory)

    monkeypatch.setattr(SafetensorsFile, "open_read", counted)
    memory = ReadMemory()
    with CheckpointFiles(tiny_model_dir) as files:
        apart = files.read_all(plan)
        assert opened == [1] * len(plan.reads)
        opened.clear()
        memory.take(plan.num_bytes * 2).fill_(0x5A)  # what was there before does not show
        together = files.read_all(plan, memory=memory)
        assert sum(opened) == len(plan.reads)
        assert len(opened) < len(plan.reads) / 2
    assert list(together) == list(apart)
    for name, tensor in together.items():
        assert tensor.dtype == apart[name].dtype
        assert torch.equal(tensor.view(torch.uint8), apart[name].view(torch.uint8)), name
