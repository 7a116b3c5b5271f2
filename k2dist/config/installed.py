"""What is installed in this process's Python: versions by metadata, code by digest; nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from hashlib import blake2b
from pathlib import Path

DIGEST_CHARS = 12  # of digests that people compare by eye
_CODE = (".py", ".so")
# What makes a checkpoint this one, without its weights: those are checked by manifest and self-test.
MODEL_FILES = ("config.json", "model.safetensors.index.json", "tiktoken.model", "tokenizer_config.json")


def version_of(distribution: str) -> str:
    """As its metadata says; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def code_digest(package: str) -> str:
    """Of a package's Python files and libraries, by their names and bytes: two installations that give equal
    digests run the same code. Empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    root = Path(spec.submodule_search_locations[0])
    digest = blake2b()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _CODE):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST_CHARS]


def files_digest(directory: Path, names: tuple[str, ...]) -> str:
    """Of those of the named files that are there; empty if none is."""
    digest, found = blake2b(), False
    for path in (directory / name for name in names):
        if path.is_file():
            found = True
            digest.update(f"{path.name}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST_CHARS] if found else ""
