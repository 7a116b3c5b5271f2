"""k2dist: a multi-node distributed inference runtime for Kimi-K2."""

__version__ = "0.1.0"
