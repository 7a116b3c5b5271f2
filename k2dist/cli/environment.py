"""All that k2dist takes from the environment, and all that it sets there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

RAY_ADDRESS = "RAY_ADDRESS"  # of a Ray to join; without it k2dist starts one
API_KEY = "K2DIST_API_KEY"  # for commands that talk to a running cluster
_RAY_AUTH_MODE = "RAY_AUTH_MODE"


def prepare_environment() -> None:
    """Before torch, ray and grpc are imported: threads that wait in the kernel, what a driver needs that
    joins a Ray of our own (`cluster.ray_host`), quiet for the transport, whose errors reach us as statuses.

    After each of torch's parallel regions an OpenMP thread would spin for up to 14 ms, on the core that the
    native kernels' own thread is to use: a decode step took 51 ms in place of 34, on two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if ray_address() is None:
        os.environ.setdefault(_RAY_AUTH_MODE, "token")


def ray_address() -> str | None:
    return os.environ.get(RAY_ADDRESS) or None


def openai_api_key() -> str | None:
    """Where OpenAI's own client looks for it."""
    return os.environ.get("OPENAI_API_KEY") or None


def api_key() -> str | None:
    return os.environ.get(API_KEY) or None


def records_dir() -> Path:
    """Where this user's running clusters are noted."""
    return Path(tempfile.gettempdir()) / f"k2dist-{os.getuid()}"
