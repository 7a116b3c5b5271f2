"""Write a training state as a checkpoint in Moonshot's form: block FP8, one layer to a file.

python -m k2dist.demo.export RUN_DIR MODEL_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from k2dist.checkpoint import write_checkpoint
from k2dist.demo.shape import write_configs
from k2dist.demo.trainee import Trainee
from k2dist.demo.vocabulary import copy_vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    export(options.run, options.model)


def export(run_dir: Path, model_dir: Path) -> None:
    """Everything a served model needs, from `state.pt` and the vocabulary of a training run."""
    architecture = write_configs(model_dir)
    trainee = Trainee(architecture, seed=0, dtype=torch.float32)
    trainee.load_state_dict(torch.load(run_dir / "state.pt", weights_only=True)["model"])
    write_checkpoint(model_dir, architecture, trainee.published(), with_inv_freq=True)
    copy_vocabulary(run_dir, model_dir)


if __name__ == "__main__":
    main()
