"""What an index says of the size of all its tensors, beside what their headers say."""

from __future__ import annotations

from pathlib import Path

import msgspec

from k2dist.checkpoint.load import CheckpointFiles
from k2dist.checkpoint.names import INDEX_NAME
from k2dist.errors import CheckpointError
from k2dist.messages import Message


class IndexSize(Message, frozen=True, kw_only=True):
    """Bytes. `said`: `metadata.total_size`; None: there is none. `found`: of all tensors in the files."""

    said: float | None  # some tools write it as a float
    found: int


def index_size(model_dir: Path) -> IndexSize:
    """Nothing reads the figure; a wrong one hints that the index is of another upload than its files.

    Raises `CheckpointError` for one that is no number.
    """
    path, said = model_dir / INDEX_NAME, None
    if path.is_file():
        try:
            said = msgspec.json.decode(path.read_bytes(), type=_Index).metadata.total_size
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{path}: {error}") from error
    with CheckpointFiles(model_dir) as files:
        tensors = [tensor for each in files.maps() for tensor in each.tensors.values()]
    return IndexSize(said=said, found=sum(tensor.end - tensor.begin for tensor in tensors))


class _Metadata(msgspec.Struct, frozen=True):
    total_size: float | None = None


class _Index(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()
