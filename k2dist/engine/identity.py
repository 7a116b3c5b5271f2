"""A rank's fingerprint: what its kernels, its libraries, its machine and its checkpoint say of themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from k2kernels import KernelSet

from k2dist.config.installed import MODEL_FILES, code_digest, files_digest, version_of
from k2dist.parallel.fingerprint import Fingerprint


def fingerprint(model_dir: Path, kernels: KernelSet, tp: int, device: torch.device) -> Fingerprint:
    """Of a rank with these; reads about 20 MB of sources and index."""
    return Fingerprint(
        k2dist=f"{version_of('k2dist')} {code_digest('k2dist')}",
        model=files_digest(model_dir, MODEL_FILES),
        dtype=str(kernels.dtype).removeprefix("torch."),
        tp=tp,
        kernels=kernels.name,
        kernel_versions=(*kernels.versions, f"code {code_digest('k2kernels')}"),
        torch=str(torch.__version__),
        device=_device_name(device),
    )


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"CPU {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
