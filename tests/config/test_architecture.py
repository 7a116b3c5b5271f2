"""config.json is read as published, and what would change the arithmetic is refused by name."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k2dist.config import Architecture, Yarn, read_architecture
from k2dist.errors import CheckpointError, ConfigError
from tests.published_config import published_config

K2_DIR = Path(__file__).parent / "data" / "kimi-k2-instruct"  # the published files, k2_facts section 1.1
K2: dict[str, Any] = json.loads((K2_DIR / "config.json").read_text())
ABSENT = object()


def read(model_dir: Path, changes: dict[str, Any], generation: dict[str, Any] | None = None) -> Architecture:
    """Read K2's config with `changes`; a dotted key reaches into a section, ABSENT removes."""
    config = json.loads(json.dumps(K2))
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = config
        for section in sections:
            place = place[section]
        if value is ABSENT:
            del place[name]
        else:
            place[name] = value
    (model_dir / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (model_dir / "generation_config.json").write_text(json.dumps(generation))
    return read_architecture(model_dir)


def test_kimi_k2_instruct_is_read_as_published() -> None:
    k2 = read_architecture(K2_DIR)
    assert k2 == Architecture(
        model_type="kimi_k2",
        hidden_size=7168,
        num_layers=61,
        num_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_experts=384,
        num_shared_experts=1,
        top_k=8,
        first_dense_layers=1,
        num_groups=1,
        top_k_groups=1,
        norm_top_k=True,
        routed_scale=2.827,
        rms_norm_eps=1e-6,
        inner_norm_eps=1e-6,
        rope_theta=50000.0,
        yarn=Yarn(
            factor=32.0,
            original_max_positions=4096,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        max_positions=131072,
        vocab_size=163840,
        bos_token_id=163584,
        eos_token_ids=(163585, 163586),
        scale_block=128,
    )
    assert (k2.qk_head_dim, k2.latent_dim, k2.shared_width, k2.num_moe_layers) == (192, 576, 2048, 60)
    assert [layer for layer in range(61) if not k2.is_moe_layer(layer)] == [0]
    assert k2.softmax_scale == pytest.approx(0.13086079996, rel=1e-10)


def test_0905_differs_in_context_alone(tmp_path: Path) -> None:
    later = read(
        tmp_path, {"rope_scaling.factor": 64.0, "max_position_embeddings": 262144}, {"eos_token_id": 163586}
    )
    k2 = read_architecture(K2_DIR)
    assert k2.yarn is not None
    assert later == msgspec.structs.replace(
        k2, yarn=msgspec.structs.replace(k2.yarn, factor=64.0), max_positions=262144
    )
    assert later.softmax_scale == pytest.approx(0.14467962580, rel=1e-10)


def test_deepseek_v3_is_read(tmp_path: Path) -> None:
    v3 = read(
        tmp_path,
        {
            "model_type": "deepseek_v3",
            "num_attention_heads": 128,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "rope_theta": 10000,
            "rope_scaling.factor": 40,
            "rope_scaling.beta_fast": 32,
            "rope_scaling.beta_slow": 1,
            "max_position_embeddings": 163840,
            "vocab_size": 129280,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "num_nextn_predict_layers": 1,
            "ep_size": 1,
        },
    )
    assert (v3.num_groups, v3.top_k_groups, v3.num_mtp_layers, v3.eos_token_ids) == (8, 4, 1, (1,))
    assert v3.yarn is not None
    assert (v3.yarn.factor, v3.yarn.beta_fast) == (40.0, 32.0)


def test_a_config_that_transformers_saved_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    yarn = {k: v for k, v in K2["rope_scaling"].items() if k != "type"}
    saved = transformers.DeepseekV3Config(
        n_routed_experts=48,
        num_nextn_predict_layers=0,
        rope_parameters={"rope_type": "yarn", "rope_theta": 50000.0, **yarn},
    )
    saved.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    architecture = read_architecture(tmp_path)
    assert architecture.yarn == read_architecture(K2_DIR).yarn
    assert (architecture.rope_theta, architecture.scale_block, architecture.num_experts) == (
        50000.0,
        None,
        48,
    )


@pytest.mark.parametrize("scale_block", [128, None])
@pytest.mark.parametrize("has_yarn", [True, False])
def test_what_is_published_is_read_again(tmp_path: Path, scale_block: int | None, *, has_yarn: bool) -> None:
    architecture = msgspec.structs.replace(read_architecture(K2_DIR), scale_block=scale_block)
    if not has_yarn:
        architecture = msgspec.structs.replace(architecture, yarn=None)
    (tmp_path / "config.json").write_text(json.dumps(published_config(architecture)))
    assert read_architecture(tmp_path) == architecture


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_both_spellings_of_the_rope_type_are_read(tmp_path: Path, spelling: str) -> None:
    changes = {"rope_scaling.type": ABSENT, f"rope_scaling.{spelling}": "yarn"}
    assert read(tmp_path, changes).yarn == read_architecture(K2_DIR).yarn


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(5, None, (5,)), ([5, 6], 7, (5, 6, 7)), (5, [7, 5], (5, 7)), (ABSENT, 7, (7,))],
)
def test_every_end_token_is_kept(
    tmp_path: Path, config_eos: object, generation_eos: object, expected: tuple[int, ...]
) -> None:
    generation = None if generation_eos is None else {"eos_token_id": generation_eos}
    assert read(tmp_path, {"eos_token_id": config_eos}, generation).eos_token_ids == expected


REFUSED: list[tuple[str, Any, str]] = [
    ("quantization_config.quant_method", "compressed-tensors", "accepted: fp8"),
    ("quantization_config.fmt", "e5m2", 'accepted: "e4m3"'),
    ("quantization_config.activation_scheme", "static", 'accepted: "dynamic"'),
    ("quantization_config.weight_block_size", [64, 64], "[128, 128]"),
    ("quantization_config.weight_block_size", ABSENT, "[128, 128]"),
    ("quantization_config.scale_fmt", "ue8m0", "not a known setting"),
    ("quantization_config", "fp8", "give an object"),
    ("topk_method", "greedy", 'accepted: "noaux_tc"'),
    ("scoring_func", "softmax", 'accepted: "sigmoid"'),
    ("hidden_act", "gelu", 'accepted: "silu"'),
    ("attention_bias", True, "accepted: false"),
    ("tie_word_embeddings", True, "accepted: false"),
    ("rope_interleave", False, "accepted: true"),
    ("moe_layer_freq", 2, "accepted: 1"),
    ("model_type", "kimi_k25", "accepted: kimi_k2, deepseek_v3"),
    ("rope_scaling.type", "linear", "accepted: yarn, default"),
    ("rope_scaling.beta_fast", ABSENT, "give a number above 0"),
    ("rope_scaling.factor", 0.5, "at least 1"),
    ("rope_scaling.attention_factor", 1.0, "not a known setting"),
    ("rope_scaling.rope_type", "default", "contradicts `type`"),
    ("rope_parameters", {"rope_type": "yarn"}, "keep one of the two"),
    ("hidden_size", 0, "at least 1"),
    ("hidden_size", "7168", "give a whole number"),
    ("hidden_size", True, "give a whole number"),
    ("hidden_size", 7168.5, "give a whole number"),
    ("hidden_size", ABSENT, "give a whole number"),
    ("q_lora_rank", None, "give a whole number"),
    ("n_shared_experts", 0, "at least 1"),
    ("norm_topk_prob", 1, "give true or false"),
    ("rms_norm_eps", 0, "above 0"),
    ("rms_norm_eps", "1e-6", "above 0"),
    ("eos_token_id", [], "token id"),
    ("eos_token_id", ABSENT, "token id"),
    ("bos_token_id", 163840, "not below vocab_size"),
    ("sliding_window", 4096, "not a known setting"),
    ("n_group", 5, "must divide"),
    ("topk_group", 2, "more than n_group"),
    ("num_experts_per_tok", 385, "hold only 384"),
    ("first_k_dense_replace", 62, "more than num_hidden_layers"),
    ("qk_rope_head_dim", 63, "even"),
    ("moe_intermediate_size", 2000, "multiple of 128"),
]


@pytest.mark.parametrize(("key", "value", "remedy"), REFUSED, ids=[f"{k}-{v!r:.12}" for k, v, _ in REFUSED])
def test_a_fault_names_path_value_and_remedy(tmp_path: Path, key: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {key: value})
    (line,) = str(caught.value).splitlines()
    shown = "missing" if value is ABSENT else json.dumps(value, separators=(",", ":"))
    assert line.startswith(f"{tmp_path / 'config.json'}: {key}={shown}")
    assert remedy in line


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            {"hidden_size": -1, "scoring_func": "softmax", "rope_scaling.type": "su", "n_group": ABSENT},
            {"eos_token_id": "<|im_end|>"},
        )
    faults = str(caught.value).splitlines()
    for name in ("hidden_size=-1", 'scoring_func="softmax"', 'rope_scaling.type="su"', "n_group=missing"):
        assert sum(name in fault for fault in faults) == 1
    assert sum("generation_config.json: eos_token_id" in fault for fault in faults) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": 163839, "dtype": "bfloat16", "sliding_window": None, "_name_or_path": "x"},
        {"hidden_act": ABSENT, "topk_method": ABSENT, "scoring_func": ABSENT, "moe_layer_freq": ABSENT},
    ],
)
def test_what_says_nothing_about_the_arithmetic_is_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    architecture = read(tmp_path, changes, {"eos_token_id": 163586})
    assert architecture == read_architecture(K2_DIR)


def test_no_directory_and_no_config_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_architecture(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hidden_size": NaN}'])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: .*JSON object"):
        read_architecture(tmp_path)
