"""What a rank's memory depends on besides model and layout."""

from __future__ import annotations

from typing import Literal

from k2dist.config import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.messages import Message
from k2dist.parallel.buckets import Bucket, buckets
from k2dist.planner.devices import device_bytes


class Form(Message, frozen=True, kw_only=True):
    """How a kernel set keeps weights and cache (`held`).

    reference   every linear, and what is absorbed of kv_b, in float32
    native      float8 in panels of 16 outputs, each with its own scales; kv_b's key part twice
    triton      as published, float8 with scales or bfloat16; kv_b in the stream's type
    """

    kernels: Literal["reference", "native", "triton"]
    stream_bytes: int  # of an element of the residual stream, embedding, norms, cache, experts' outputs


class Terms(Message, frozen=True, kw_only=True):
    """How weights are held, how large a step can be, and what a device offers. Counts are per lane."""

    form: Form
    page_tokens: int
    step_tokens: int  # rows of one step
    max_samples: int  # rows of one step that give logits
    reserve_bytes: int  # of each device, for what is not planned
    device_bytes: int | None  # of one rank's device; None: not known
    recorded: tuple[Bucket, ...] = ()  # sizes of decode steps, a graph each; descending
    are_experts_here: bool = True  # False: their weights are in the machine's memory, not the device's
    # Times an even load, on the fullest rank. Our assumption: nothing measured stands behind it yet.
    imbalance: float = 4.0


def triton_form(stream_bytes: int = 2) -> Form:
    return Form(kernels="triton", stream_bytes=stream_bytes)


def native_form() -> Form:
    return Form(kernels="native", stream_bytes=2)


def reference_form(stream_bytes: int = 2) -> Form:
    return Form(kernels="reference", stream_bytes=stream_bytes)


def form_named(kernels: str, stream_bytes: int) -> Form:
    """Of the set that calls itself `kernels`."""
    match kernels:
        case "native":
            return native_form()
        case "triton":
            return triton_form(stream_bytes)
        case "reference":
            return reference_form(stream_bytes)
    raise AssertionError(f"no form is known for kernels {kernels!r}")


def configured_terms(config: ClusterConfig, architecture: Architecture) -> Terms:
    """`kernels: auto` is what `engine.kernels` takes where everything is installed."""
    stream_bytes = 2 if config.dtype == "bfloat16" else 4
    return Terms(
        form=form_named(configured_kernels(config), stream_bytes),
        page_tokens=config.cache.page_tokens,
        step_tokens=config.scheduler.step_tokens,
        max_samples=config.scheduler.max_running,
        reserve_bytes=config.nodes.reserve_bytes,
        device_bytes=device_bytes(config),
        recorded=recorded_sizes(config, architecture.max_positions),
        are_experts_here=config.ranks.rank_gpus == 0 or config.ranks.experts_device == "auto",
    )


def recorded_sizes(config: ClusterConfig, max_positions: int) -> tuple[Bucket, ...]:
    """Of decode steps. None on a CPU, none where the config forbids it, and none where what travels between
    ranks has no capacity."""
    travels = config.parallel.world_size > 1
    if config.ranks.rank_gpus == 0 or config.ranks.graphs == "off":
        return ()
    if travels and config.capacity_factor is None:
        return ()
    most_pages = -(-max_positions // config.cache.page_tokens)  # a lane with fewer records fewer
    return buckets(config.scheduler.max_running, most_pages)


def configured_kernels(config: ClusterConfig) -> str:
    """The kernel set that ranks will use: `auto` by the device, and on a CPU by the stream."""
    if config.kernels != "auto":
        return config.kernels
    if config.ranks.rank_gpus > 0:
        return "triton"
    return "native" if config.dtype == "bfloat16" else "reference"
