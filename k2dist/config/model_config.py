"""A model directory's `config.json` and `generation_config.json`, read strictly.

What would change the arithmetic and is not implemented is refused by name; so is a key that is not known
here, since nobody could tell which of the two it is. All faults are reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from k2dist.config.architecture import Architecture, Yarn
from k2dist.errors import CheckpointError, ConfigError

# Keys that published configs carry and that say nothing about the arithmetic, or repeat another key.
INFORMATIONAL = frozenset(
    {
        *("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("initializer_range", "pretraining_tp", "aux_loss_alpha", "seq_aux", "attention_dropout", "ep_size"),
        *("router_aux_loss_coef", "output_router_logits", "num_key_value_heads", "head_dim", "qk_head_dim"),
        *("pad_token_id", "unk_token_id", "sep_token_id", "is_encoder_decoder", "chunk_size_feed_forward"),
        *("return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type"),
    }
)

# Settings with one meaning in this family. Absent means the same; another value is refused.
SOLE_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
}
MODEL_TYPES = ("kimi_k2", "deepseek_v3")
SCALE_BLOCK = 128


def read_architecture(model_dir: Path) -> Architecture:
    """The architecture that this directory's configs state.

    Raises `CheckpointError` if the directory or its config.json is not there, `ConfigError` with path, value
    and remedy of every fault. A missing generation_config.json only means that it names no further end token.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory; give the directory that holds config.json")
    path = model_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint's config.json belongs beside its weights")
    config = _read_object(path)
    generation_path = model_dir / "generation_config.json"
    generation = _read_object(generation_path) if generation_path.is_file() else {}
    fields = _Fields(config)
    end_tokens = _Fields(generation)
    architecture = _architecture(fields, end_tokens.token_ids("eos_token_id", is_required=False))
    fields.refuse_unknown()
    faults = [f"{path}: {fault}" for fault in fields.faults]
    faults += [f"{generation_path}: {fault}" for fault in end_tokens.faults]
    faults += [f"{path}: {fault}" for fault in ([] if faults else _contradictions(architecture))]
    if faults:
        raise ConfigError("\n".join(faults))
    return architecture


def _architecture(fields: _Fields, generation_eos: tuple[int, ...]) -> Architecture:
    for name, accepted in SOLE_VALUES.items():
        fields.sole(name, accepted)
    model_type = fields.choice("model_type", MODEL_TYPES)
    rope_theta, yarn = _rope(fields)
    eos = fields.token_ids("eos_token_id", is_required=not generation_eos)
    return Architecture(
        model_type=model_type,
        hidden_size=fields.count("hidden_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=fields.count("num_attention_heads"),
        q_lora_rank=fields.count("q_lora_rank"),
        kv_lora_rank=fields.count("kv_lora_rank"),
        qk_nope_head_dim=fields.count("qk_nope_head_dim"),
        qk_rope_head_dim=fields.count("qk_rope_head_dim"),
        v_head_dim=fields.count("v_head_dim"),
        intermediate_size=fields.count("intermediate_size"),
        moe_intermediate_size=fields.count("moe_intermediate_size"),
        num_experts=fields.count("n_routed_experts"),
        num_shared_experts=fields.count("n_shared_experts"),
        top_k=fields.count("num_experts_per_tok"),
        first_dense_layers=fields.count("first_k_dense_replace", least=0),
        num_groups=fields.count("n_group"),
        top_k_groups=fields.count("topk_group"),
        norm_top_k=fields.flag("norm_topk_prob"),
        routed_scale=fields.number("routed_scaling_factor"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        yarn=yarn,
        max_positions=fields.count("max_position_embeddings"),
        vocab_size=fields.count("vocab_size"),
        bos_token_id=fields.count("bos_token_id", least=0),
        eos_token_ids=tuple(dict.fromkeys((*eos, *generation_eos))),
        scale_block=_scale_block(fields),
        num_mtp_layers=fields.count("num_nextn_predict_layers", least=0, default=0),
    )


def _rope(fields: _Fields) -> tuple[float, Yarn | None]:
    """`rope_theta` and `rope_scaling`, or both in `rope_parameters` as transformers 5 writes them."""
    scaling, parameters = fields.section("rope_scaling"), fields.section("rope_parameters")
    if scaling is not None and parameters is not None:
        fields.fault("rope_parameters", "given besides rope_scaling; keep one of the two")
        return fields.number("rope_theta"), None
    has_theta = parameters is not None and "rope_theta" in parameters.values
    theta = (parameters if parameters and has_theta else fields).number("rope_theta")
    section = scaling or parameters
    if section is None:
        return theta, None
    yarn = _yarn(section)
    section.refuse_unknown()
    return theta, yarn


def _yarn(section: _Fields) -> Yarn | None:
    kinds = [name for name in ("type", "rope_type") if section.optional(name) is not None] or ["type"]
    kind = section.choice(kinds[0], ("yarn", "default"))
    if section.optional("rope_type") not in (None, section.optional(kinds[0])):
        section.fault("rope_type", "contradicts `type`; keep one of the two")
    if kind == "default":
        return None
    return Yarn(
        factor=section.number("factor", least=1.0),
        original_max_positions=section.count("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast"),
        beta_slow=section.number("beta_slow"),
        mscale=section.number("mscale", least=0.0),
        mscale_all_dim=section.number("mscale_all_dim", least=0.0),
    )


def _scale_block(fields: _Fields) -> int | None:
    section = fields.section("quantization_config")
    if section is None:
        return None
    if section.choice("quant_method", ("fp8",)) == "fp8":
        section.sole("fmt", ("e4m3",))
        section.sole("activation_scheme", ("dynamic",))
        blocks = section.optional("weight_block_size")
        if blocks != [SCALE_BLOCK, SCALE_BLOCK]:
            section.fault("weight_block_size", f"only [{SCALE_BLOCK}, {SCALE_BLOCK}] is implemented")
        section.refuse_unknown()
    return SCALE_BLOCK


def _contradictions(a: Architecture) -> Iterator[str]:
    """Values that are fine alone and cannot go together."""
    if a.first_dense_layers > a.num_layers:
        yield f"first_k_dense_replace={a.first_dense_layers}: more than num_hidden_layers={a.num_layers}"
    if a.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim={a.qk_rope_head_dim}: rotary features come in pairs; use an even number"
    yield from _group_faults(a)
    for name, token_ids in (("bos_token_id", (a.bos_token_id,)), ("eos_token_id", a.eos_token_ids)):
        for token_id in token_ids:
            if token_id >= a.vocab_size:
                yield f"{name}={token_id}: not below vocab_size={a.vocab_size}"
    if a.scale_block is not None:
        yield from _contraction_faults(a, a.scale_block)


def _group_faults(a: Architecture) -> Iterator[str]:
    if a.num_experts % a.num_groups:
        yield f"n_group={a.num_groups}: must divide n_routed_experts={a.num_experts}"
        return
    group_size = a.num_experts // a.num_groups
    if a.top_k_groups > a.num_groups:
        yield f"topk_group={a.top_k_groups}: more than n_group={a.num_groups}"
    elif a.top_k > a.top_k_groups * group_size:
        yield (
            f"num_experts_per_tok={a.top_k}: {a.top_k_groups} of {a.num_groups} groups "
            f"hold only {a.top_k_groups * group_size} experts"
        )
    if a.num_groups > 1 and group_size < 2:
        yield f"n_group={a.num_groups}: a group is scored by its best two experts and has {group_size}"


def _contraction_faults(a: Architecture, block: int) -> Iterator[str]:
    """Activations are quantised in runs of 128 channels, so a width that is summed over holds whole runs."""
    widths = {
        "hidden_size": a.hidden_size,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "num_attention_heads x v_head_dim": a.num_heads * a.v_head_dim,
        "moe_intermediate_size": a.moe_intermediate_size,
    }
    if a.first_dense_layers:
        widths["intermediate_size"] = a.intermediate_size
    for name, width in widths.items():
        if width % block:
            yield f"{name}={width}: block FP8 needs a multiple of {block}"


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a {type(value).__name__} where a JSON object is expected")
    return value


class _Fields:
    """One JSON object: takes values out by name and type, and notes every fault instead of stopping at one.

    A faulty value is replaced by a legal one, so that reading goes on; nobody uses the result then.
    """

    def __init__(self, values: dict[str, object], prefix: str = "", faults: list[str] | None = None) -> None:
        self.values = values
        self.faults: list[str] = [] if faults is None else faults
        self._prefix = prefix
        self._known = set(INFORMATIONAL) if not prefix else set()

    def fault(self, name: str, remedy: str) -> None:
        value = self.values.get(name, "missing")
        shown = value if value == "missing" else msgspec.json.encode(value).decode()
        self.faults.append(f"{self._prefix}{name}={_short(shown)}: {remedy}")

    def optional(self, name: str) -> object:
        """The value, or None if absent or null."""
        self._known.add(name)
        return self.values.get(name)

    def count(self, name: str, *, least: int = 1, default: int | None = None) -> int:
        value = self.optional(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.fault(name, f"give a whole number of at least {least}")
            return least
        return value

    def number(self, name: str, *, least: float | None = None) -> float:
        """A finite number above 0, or of at least `least`."""
        value = self.optional(name)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or (value <= 0 if least is None else value < least)
        ):
            self.fault(
                name, "give a number above 0" if least is None else f"give a number of at least {least:g}"
            )
            return 1.0
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.optional(name)
        if not isinstance(value, bool):
            self.fault(name, "give true or false")
            return False
        return value

    def choice(self, name: str, accepted: tuple[str, ...]) -> str:
        value = self.optional(name)
        if not isinstance(value, str) or value not in accepted:
            self.fault(name, f"not implemented; accepted: {', '.join(accepted)}")
            return ""
        return value

    def sole(self, name: str, accepted: tuple[object, ...]) -> None:
        value = self.optional(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
            shown = ", ".join(msgspec.json.encode(one).decode() for one in accepted)
            self.fault(name, f"not implemented; accepted: {shown}")

    def token_ids(self, name: str, *, is_required: bool) -> tuple[int, ...]:
        """One id or a list of ids."""
        value = self.optional(name)
        if value is None and not is_required:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not ids or any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in ids):
            self.fault(name, "give a token id or a list of token ids")
            return ()
        return tuple(ids)

    def section(self, name: str) -> _Fields | None:
        """A nested object, whose faults land here; None if absent or null."""
        value = self.optional(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fault(name, "give an object or null")
            return None
        return _Fields(value, f"{self._prefix}{name}.", self.faults)

    def refuse_unknown(self) -> None:
        for name in sorted(self.values.keys() - self._known):
            if self.values[name] is not None and not name.startswith("_"):
                self.fault(
                    name, "not a known setting of this family; remove it if it does not change the arithmetic"
                )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
