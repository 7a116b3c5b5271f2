"""Names of a checkpoint's files that do not depend on its number of shards."""

from __future__ import annotations

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"  # a checkpoint of one file needs no index
