"""What a rank's memory depends on besides model and layout."""

from __future__ import annotations

from k2dist.config.cluster import ClusterConfig
from k2dist.messages import Message


class Form(Message, frozen=True, kw_only=True):
    """How a kernel set keeps weights and cache: bytes of one element."""

    linear_bytes: int | None  # None: as published, float8 with its scales or bfloat16
    plain_bytes: int  # of the head and of the absorbed parts of kv_b
    stream_bytes: int  # of the residual stream; also of embedding, norms, cache and experts' outputs


class Terms(Message, frozen=True, kw_only=True):
    """How weights are held, how large a step can be, and what a device offers. Counts are per lane."""

    form: Form
    page_tokens: int
    step_tokens: int  # rows of one step
    max_samples: int  # rows of one step that give logits
    reserve_bytes: int  # of each device, for what is not planned
    device_bytes: int | None  # of one rank's device; None: not known
    are_experts_here: bool = True  # False: their weights are in the machine's memory, not the device's
    # Times an even load, on the fullest rank. Our assumption: nothing measured stands behind it yet.
    imbalance: float = 4.0


def served_form(stream_bytes: int = 2) -> Form:
    """Of kernel sets that compute on float8 weights as they are published."""
    return Form(linear_bytes=None, plain_bytes=stream_bytes, stream_bytes=stream_bytes)


def reference_form(stream_bytes: int = 2) -> Form:
    """Of the reference kernels: every linear, and what is absorbed, in float32."""
    return Form(linear_bytes=4, plain_bytes=4, stream_bytes=stream_bytes)


def configured_terms(config: ClusterConfig) -> Terms:
    """Ranks with a GPU keep float8 weights as they are; on a CPU there are only the reference kernels yet."""
    stream_bytes = 2 if config.dtype == "bfloat16" else 4
    is_served = config.kernels == "auto" and config.ranks.rank_gpus > 0
    return Terms(
        form=served_form(stream_bytes) if is_served else reference_form(stream_bytes),
        page_tokens=config.cache.page_tokens,
        step_tokens=config.scheduler.step_tokens,
        max_samples=config.scheduler.max_running,
        reserve_bytes=config.nodes.reserve_bytes,
        device_bytes=config.nodes.device_bytes,
        are_experts_here=config.ranks.rank_gpus == 0 or config.ranks.experts_device == "auto",
    )
