"""The demo: a small Kimi-K2 that answers, the conversations it learnt from, its training and its evaluation.

`MODEL_DIR` holds the trained checkpoint in Moonshot's form. Names: corpus (conversations), vocabulary, train,
export, evaluate.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR"]
