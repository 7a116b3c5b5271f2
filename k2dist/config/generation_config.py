"""What a model's generation_config.json says about sampling, for clients that say nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from k2dist.errors import CheckpointError
from k2dist.messages import Message

GENERATION_CONFIG = "generation_config.json"
DEFAULT_TEMPERATURE = 0.6  # Kimi-K2-Instruct's model card


class SamplingDefaults(Message, frozen=True, kw_only=True):
    """The values of fields that a client leaves open."""

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


class _GenerationConfig(msgspec.Struct):
    """The keys of generation_config.json that concern sampling; transformers writes many more."""

    do_sample: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


def read_sampling_defaults(model_dir: Path) -> SamplingDefaults:
    """Defaults from generation_config.json where it has them; the file may be absent, but not malformed.

    `do_sample: false` means greedy, as in transformers.
    """
    path = model_dir / GENERATION_CONFIG
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_GenerationConfig)
    except FileNotFoundError:
        return SamplingDefaults()
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: {error}; correct it or take it away") from error
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if (value := getattr(config, name)) is not None
    }
    if not config.do_sample:
        given["temperature"] = 0.0
    return SamplingDefaults(**given)
