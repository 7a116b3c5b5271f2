"""The demo: a small Kimi-K2 that answers, the conversations it learnt from, its training and its evaluation.

`MODEL_DIR` holds the trained checkpoint in Moonshot's form, `LAPTOP_CONFIG` a cluster for it. Names: corpus
(conversations), vocabulary, train, export, evaluate.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
LAPTOP_CONFIG = Path(__file__).parent / "laptop.yaml"  # cluster_configs/laptop.yaml, as package data

__all__ = ["LAPTOP_CONFIG", "MODEL_DIR"]
