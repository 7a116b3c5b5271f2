"""What the service knows of the model that it serves: limits, end tokens, defaults for sampling."""

from __future__ import annotations

from pathlib import Path

import msgspec

from k2dist.errors import CheckpointError
from k2dist.messages import Message
from k2dist.service.sampling import SamplingDefaults

GENERATION_CONFIG = "generation_config.json"


class ServedModel(Message, frozen=True, kw_only=True):
    """`max_positions` bounds prompt and answer together: its context, or less where pages are fewer."""

    name: str
    max_positions: int
    vocab_size: int
    end_token_ids: frozenset[int]
    defaults: SamplingDefaults


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
