"""What files say, read strictly: a model's architecture from its `config.json`, a cluster from its YAML."""

from k2dist.config.architecture import Architecture, Yarn
from k2dist.config.model_config import read_architecture
from k2dist.config.named import KIMI_K2, find_architecture

__all__ = [
    "KIMI_K2",
    "Architecture",
    "Yarn",
    "find_architecture",
    "read_architecture",
]
