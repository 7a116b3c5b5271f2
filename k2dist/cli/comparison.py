"""A checkpoint's logits beside those of transformers, an implementation that shares nothing with this one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import psutil

from k2dist.config import Architecture
from k2dist.messages import Message
from k2dist.parallel import published_tensors
from k2dist.parallel.published import DTYPE_BYTES, SCALE_SUFFIX

NUM_TOKENS = 24
# transformers' weights in float32: dequantised, then stacked per layer, then copied into its model.
BYTES_PER_WEIGHT = 12


class Comparison(Message, frozen=True, kw_only=True):
    """`off`: the largest difference of any logit, as a share of the largest logit; None: not compared."""

    off: float | None = None
    reason: str = ""  # why not
    version: str = ""  # of transformers


def compare(model_dir: Path, architecture: Architecture) -> Comparison:
    """In float32 on the dequantised weights, if transformers is installed and the model fits in memory."""
    if find_spec("transformers") is None:
        return Comparison(reason="transformers is not installed; it comes with k2dist[train]")
    needed, free = bytes_needed(architecture), psutil.virtual_memory().available
    if needed > free:
        return Comparison(reason=f"{needed:,} bytes of memory needed, {free:,} are free")
    import transformers

    return Comparison(off=_off(model_dir, architecture), version=transformers.__version__)


def bytes_needed(architecture: Architecture) -> int:
    total = 0
    for tensor in published_tensors(architecture):
        num_values = tensor.num_bytes // DTYPE_BYTES[tensor.dtype]
        is_scale = tensor.name.endswith(SCALE_SUFFIX)
        total += tensor.num_bytes + (0 if is_scale else BYTES_PER_WEIGHT * num_values)
    return total


def _off(model_dir: Path, architecture: Architecture) -> float:
    import torch
    from k2kernels import KernelSet

    from k2dist.checkpoint import load_shard
    from k2dist.demo.export import dequantised
    from k2dist.demo.offline import transformers_model
    from k2dist.engine.solo import solo_logits
    from k2dist.parallel import first_layout, shard_plan

    token_ids = [7919 * i % architecture.vocab_size for i in range(NUM_TOKENS)]
    plan = shard_plan(architecture, first_layout(architecture, lanes=1, tp=1), 0)
    theirs = transformers_model(read_config(model_dir), dequantised(load_shard(model_dir, plan)))
    with torch.inference_mode():
        theirs_TV = theirs(torch.tensor([token_ids])).logits[0]
    del theirs
    ours_TV = solo_logits(model_dir, token_ids, KernelSet.reference(torch.float32))
    return float((ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max())


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json as transformers takes it; `read_architecture` has found nothing wrong with it."""
    return msgspec.json.decode((model_dir / "config.json").read_bytes(), type=dict[str, Any])
