"""A training state as a checkpoint in Moonshot's form (block FP8, one layer to a file), and its weights back.

python -m k2dist.demo.export RUN_DIR MODEL_DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from k2dist.checkpoint import dequantise_block_fp8, write_checkpoint
from k2dist.demo.shape import write_configs
from k2dist.demo.trainee import Trainee
from k2dist.demo.vocabulary import copy_vocabulary
from k2dist.parallel.published import SCALE_SUFFIX


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


def read_weights(model_dir: Path) -> dict[str, Tensor]:
    """Float32 weights of a whole checkpoint, by published name."""
    published: dict[str, Tensor] = {}
    for path in sorted(model_dir.glob("model-*.safetensors")):
        published |= load_file(path)
    return dequantised(published)


def dequantised(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights from what a checkpoint's files hold; leftovers dropped."""
    tensors: dict[str, Tensor] = {}
    for name, value in published.items():
        if name.endswith((SCALE_SUFFIX, "rotary_emb.inv_freq")):
            continue
        scale = published.get(name + SCALE_SUFFIX)
        tensors[name] = value.float() if scale is None else dequantise_block_fp8(value, scale)
    return tensors


if __name__ == "__main__":
    main()
