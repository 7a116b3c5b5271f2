"""Architectures by name, so that a cluster can be planned before a byte of its model is there."""

from __future__ import annotations

from pathlib import Path

from k2dist.config.architecture import Architecture
from k2dist.config.model_config import read_architecture
from k2dist.errors import UsageError

# Directories with the configs of the published models, and nothing else (k2_facts 1). Of 0905's only what
# differs from the first release has been seen; the file says so.
NAMED_DIR = Path(__file__).parent / "named"
KIMI_K2 = "kimi-k2-instruct"


def architecture_names() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in NAMED_DIR.iterdir() if path.is_dir()))


def find_architecture(model: str) -> Architecture:
    """Of a model directory, or of one of `architecture_names`; a directory of such a name comes first.

    Raises `UsageError` if it is neither, otherwise as `read_architecture`.
    """
    if Path(model).is_dir():
        return read_architecture(Path(model))
    if model not in architecture_names():
        raise UsageError(
            f"--model {model}: no such directory, and not a name; give a directory that holds config.json, "
            f"or {' or '.join(architecture_names())}"
        )
    return read_architecture(NAMED_DIR / model)
