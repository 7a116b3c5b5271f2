"""k2dist: a multi-node distributed inference runtime for Kimi-K2.

`LLM` and `SamplingParams` are imported when they are first asked for: importing k2dist costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2dist.llm import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in ("LLM", "SamplingParams"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from k2dist import llm

    return getattr(llm, name)
