"""A rank finds and names what is wrong with its files, its memory or its kernels, before it takes a step."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from k2kernels import act_quant
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles, load_shard
from k2dist.checkpoint.manifest import MANIFEST_NAME, write_manifest
from k2dist.checkpoint.survey import survey
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld, RankRuntime, RankSpec
from k2dist.engine import load as engine_load
from k2dist.engine.kernels import select_kernels
from k2dist.engine.selftest import SelfTestReport, self_test
from k2dist.errors import CheckpointError, ConfigError, FaultyRankError, K2Error
from k2dist.messages import FinishReason, RankProgress, Sampling
from k2dist.model import decoder
from k2dist.model.batch import Batch
from k2dist.model.pieces import Pieces
from k2dist.model.weights import assemble
from k2dist.parallel import Layout, ShardPlan, first_layout, shard_plan
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, max_running=8, max_waiting=64, chunk_tokens=24)
DOWN = "model.layers.2.mlp.experts.{}.down_proj.weight"
Spoil = Callable[[dict[str, Tensor]], None]


def spec(
    model_dir: Path,
    world_rank: int,
    layout: Layout | None = None,
    dtype: str = "float32",
    kernels: str = "auto",
) -> RankSpec:
    layout = layout or first_layout(read_architecture(model_dir), lanes=1, tp=2, expert_only_ranks=1)
    return RankSpec(
        model_dir=str(model_dir),
        layout=layout,
        world_rank=world_rank,
        page_tokens=16,
        num_pages=8,
        limits=LIMITS,
        kernels=kernels,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def listed_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its manifest."""
    model_dir = tmp_path_factory.mktemp("listed") / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    write_manifest(model_dir / MANIFEST_NAME, survey(model_dir, read_architecture(model_dir)).manifest)
    return model_dir


# -- healthy ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("lanes", "tp", "expert_only"), [(1, 1, 0), (1, 2, 1), (1, 4, 0), (2, 1, 2)])
def test_a_healthy_rank_passes(listed_dir: Path, dtype: str, lanes: int, tp: int, expert_only: int) -> None:
    layout = first_layout(read_architecture(listed_dir), lanes=lanes, tp=tp, expert_only_ranks=expert_only)
    for world_rank in range(layout.world_size):
        report = RankRuntime(spec(listed_dir, world_rank, layout, dtype)).load()
        test = report.self_test
        assert test.has_manifest
        assert (test.num_tensors, test.num_bytes) == (report.num_tensors, report.num_bytes)
        assert 0 < test.worst_error < (1e-4 if dtype == "float32" else 0.1)


def test_load_and_test_say_how_far_they_are(tiny_model_dir: Path) -> None:
    told: list[RankProgress] = []
    report = RankRuntime(spec(tiny_model_dir, 0)).load(told.append)
    loaded = [each.num_bytes_loaded for each in told]
    tested = [each.num_bytes_tested for each in told]
    assert {each.num_bytes for each in told} == {report.num_bytes}
    assert loaded == sorted(loaded)
    assert tested == sorted(tested)
    assert (loaded[-1], tested[-1]) == (report.num_bytes, report.num_bytes)
    first_test = next(i for i, count in enumerate(tested) if count > 0)
    assert loaded[first_test - 1] == report.num_bytes, "loaded whole before it is tested"
    assert len(set(tested)) == 5, "nothing yet, then the ends and three layers"


def test_a_rank_without_experts_passes(tiny_model_dir: Path) -> None:
    """A table may leave a rank of a lane without slots, in some layers or in all."""
    architecture = read_architecture(tiny_model_dir)
    layout = first_layout(architecture, lanes=1, tp=1, expert_only_ranks=1)
    everything = tuple(range(architecture.num_experts))
    places = [
        layout.ranks[0].__class__(**{**_fields(layout, 0), "experts": ((), (3, 1))}),
        layout.ranks[1].__class__(**{**_fields(layout, 1), "experts": (everything, everything)}),
    ]
    table = Layout(tp=1, ranks=tuple(places))
    for world_rank in range(2):
        assert RankRuntime(spec(tiny_model_dir, world_rank, table)).load().self_test.worst_error < 1e-4


def _fields(layout: Layout, world_rank: int) -> dict[str, object]:
    place = layout.place(world_rank)
    return {name: getattr(place, name) for name in place.__struct_fields__}


# -- one rank's memory ---------------------------------------------------------------------------------------


def flip(name: str, row: int, col: int) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8)[row, col] ^= 0x08

    return spoil


def scale(name: str, factor: float) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_scale_inv"][0, 0] *= factor

    return spoil


def swap(one: int, other: int) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for linear in ("gate_proj", "up_proj", "down_proj"):
            for suffix in ("weight", "weight_scale_inv"):
                a, b = (f"model.layers.2.mlp.experts.{e}.{linear}.{suffix}" for e in (one, other))
                tensors[a], tensors[b] = tensors[b], tensors[a]

    return spoil


# World rank 1 of three (tp rank 1 of 2, then one with experts only) holds experts 4 to 7.
MEMORY_FAULTS: dict[str, tuple[Spoil, str]] = {
    "scale": (
        scale(DOWN.format(5), 4.0),
        rf"{DOWN.format(5)}_scale_inv: \[0, 0\] is 4 times what it should be in memory",
    ),
    "byte of an expert": (
        flip(DOWN.format(6), 200, 17),
        rf"{DOWN.format(6)}: 1 values differ in memory, at \[200, 17\]",
    ),
    "swapped experts": (
        swap(4, 7),
        r"model\.layers\.2\.mlp\.experts\.4: slot 0 holds expert 7 in its place; "
        r"model\.layers\.2\.mlp\.experts\.7: slot 3 holds expert 4 in its place$",
    ),
    "byte of the second of two parts": (
        flip("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 130, 1),
        r"model\.layers\.1\.self_attn\.kv_a_proj_with_mqa\.weight: 1 values differ in memory, at \[130, 1\]",
    ),
    "byte of kv_b": (
        flip("model.layers.1.self_attn.kv_b_proj.weight", 3, 9),
        r"model\.layers\.1\.self_attn\.kv_b_proj\.weight: 1 values differ in memory, "
        r"at \[0, 3, 9\] in its layout",
    ),
    "byte of the dense layer": (
        flip("model.layers.0.mlp.up_proj.weight", 255, 0),
        r"model\.layers\.0\.mlp\.up_proj\.weight: 1 values differ in memory, at \[255, 0\]",
    ),
    "head": (
        lambda tensors: tensors["lm_head.weight"][7].mul_(2.0),
        r"lm_head\.weight: 256 values differ in memory, at \[7, 0-255\]",
    ),
    "norm": (
        lambda tensors: tensors["model.layers.1.input_layernorm.weight"].neg_(),
        r"model\.layers\.1\.input_layernorm\.weight: 256 values differ in memory, at \[0-255\]",
    ),
    "correction bias": (
        lambda tensors: tensors["model.layers.2.mlp.gate.e_score_correction_bias"][5:6].neg_(),
        r"model\.layers\.2\.mlp\.gate\.e_score_correction_bias: 1 values differ in memory, at \[5\]",
    ),
}


def spoiling(spoil: Spoil) -> type[CheckpointFiles]:
    """Files of which world rank 1 reads something else: where it loads, not where it looks again."""

    class Spoiling(CheckpointFiles):
        def read_all(self, plan: ShardPlan, *more: Any, **named: Any) -> dict[str, Tensor]:
            tensors = super().read_all(plan, *more, **named)
            if plan.world_rank == 1:
                with contextlib.suppress(KeyError):  # it is of another layer
                    spoil(tensors)
            return tensors

    return Spoiling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MEMORY_FAULTS)
def test_what_lies_wrong_in_one_ranks_memory_is_named(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    spoil, message = MEMORY_FAULTS[name]

    def load(world_rank: int, kernels: str) -> None:
        RankRuntime(spec(tiny_model_dir, world_rank, dtype=dtype, kernels=kernels)).load()

    monkeypatch.setattr(engine_load, "CheckpointFiles", spoiling(spoil))
    load(0, "reference")
    load(2, "reference")
    with pytest.raises(FaultyRankError, match=f"^world rank 1: self-test: {message}"):
        load(1, "reference")
    # A packed layout tells the tensor, or the two that lie in one, but neither row nor column.
    tensor = message.split(":")[0].replace("_scale_inv", "")
    with pytest.raises(FaultyRankError, match=f"^world rank 1: self-test: .*{tensor}"):
        load(1, "auto")


def test_a_world_with_such_a_rank_does_not_start(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_load, "CheckpointFiles", spoiling(swap(6, 8)))
    layout = first_layout(read_architecture(tiny_model_dir), lanes=2, tp=1)
    with (
        pytest.raises(FaultyRankError, match=r"world rank 1: .*slot 0 holds expert 8"),
        LocalWorld(tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=8),
    ):
        pytest.fail("it started")


# -- one rank's files ----------------------------------------------------------------------------------------


def in_file(spoil: Spoil) -> Callable[[Path], None]:
    def rewrite(model_dir: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = model_dir / "model-3-of-3.safetensors"
        tensors = load_file(path)
        spoil(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


FILE_FAULTS: dict[str, tuple[Spoil, str]] = {
    "scale": (
        scale(DOWN.format(5), 1.001),
        rf"{DOWN.format(5)}_scale_inv: its bytes are not those of the manifest",
    ),
    "byte": (flip(DOWN.format(6), 200, 17), rf"{DOWN.format(6)}: its bytes are not those of the manifest"),
    "swapped experts": (
        swap(4, 7),
        r"model\.layers\.2\.mlp\.experts\.4\.gate_proj\.weight: holds the bytes of "
        r"model\.layers\.2\.mlp\.experts\.7\.gate_proj\.weight; .*; and \d more$",
    ),
    "row of a slice": (
        flip("model.layers.2.self_attn.q_b_proj.weight", 800, 3),
        r"model\.layers\.2\.self_attn\.q_b_proj\.weight, rows 768 to 1151: its bytes",
    ),
    "column of a slice": (
        flip("model.layers.2.self_attn.o_proj.weight", 3, 1023),
        r"model\.layers\.2\.self_attn\.o_proj\.weight, columns 768 to 1023: its bytes",
    ),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_what_one_ranks_files_hold_wrong_is_named(listed_dir: Path, tmp_path: Path, name: str) -> None:
    """Its copy of the checkpoint is spoiled; the manifest is as `k2dist verify` wrote it."""
    spoil, message = FILE_FAULTS[name]
    own_dir = tmp_path / "model"
    shutil.copytree(listed_dir, own_dir)
    in_file(spoil)(own_dir)
    with pytest.raises(CheckpointError, match=f"^world rank 1: {own_dir}: self-test: {message}"):
        RankRuntime(spec(own_dir, 1)).load()


def test_a_rank_does_not_look_at_what_others_hold(listed_dir: Path, tmp_path: Path) -> None:
    own_dir = tmp_path / "model"
    shutil.copytree(listed_dir, own_dir)
    in_file(flip("model.layers.2.self_attn.o_proj.weight", 3, 1023))(own_dir)
    in_file(flip(DOWN.format(6), 200, 17))(own_dir)
    for world_rank in (0, 2):
        assert RankRuntime(spec(own_dir, world_rank)).load().num_tensors > 0, "it loads, and tests itself"
    with pytest.raises(CheckpointError, match="self-test"):
        RankRuntime(spec(own_dir, 1)).load()


# -- kernels -------------------------------------------------------------------------------------------------


def off(value: Tensor) -> Tensor:
    """A tenth too large, in every second column."""
    wrong = value.clone()
    wrong[..., ::2] *= 1.1
    return wrong


# Which kernel, what is wrong with it, and where that must show first.
KERNEL_FAULTS: dict[str, tuple[str, str]] = {
    "rmsnorm": ("rmsnorm", "layers.0.attention of prompt rows"),
    "rope": ("rope", "layers.0.attention of prompt rows"),
    "mla_prefill": ("mla_prefill", "layers.0.attention of prompt rows"),
    "mla_decode": ("mla_decode", "layers.0.attention of generated rows"),
    "absorb": ("absorb", "layers.0.attention of generated rows"),
    "swiglu": ("swiglu", "layers.0.mlp"),
    "grouped_gemm": ("grouped_gemm", "layers.1.mlp"),
    "weighted_sum": ("weighted_sum", "layers.1.mlp"),
    "linear_bf16": ("linear_bf16", "head"),
}


def run_self_test(
    model_dir: Path, dtype: str, kernels_name: str = "reference", **wrong: Callable[..., object]
) -> SelfTestReport:
    """World rank 0 of one, with some kernels replaced."""
    if "swiglu" in wrong:  # what is served quantises in the same pass
        one, two = wrong["swiglu"], act_quant.reference
        wrong |= {"swiglu_quant": lambda h_TG, block: two(one(h_TG), block)}
    architecture = read_architecture(model_dir)
    layout = first_layout(architecture, lanes=1, tp=1)
    kernels = dataclasses.replace(select_kernels(kernels_name, dtype), name="wrong", **wrong)
    tensors = load_shard(model_dir, shard_plan(architecture, layout, 0))
    weights = assemble(tensors, architecture, layout.place(0), 1, kernels)
    return self_test(model_dir, architecture, layout, 0, weights, kernels, page_tokens=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_a_wrong_kernel_shows_in_its_half_layer(tiny_model_dir: Path, name: str, dtype: str) -> None:
    field, where = KERNEL_FAULTS[name]
    right = getattr(select_kernels("reference", dtype), field)
    message = rf"^world rank 0: self-test: {where}: kernels 'wrong' are off by"
    with pytest.raises(FaultyRankError, match=message):
        run_self_test(tiny_model_dir, dtype, **{field: lambda *args: off(right(*args))})


# What several steps in one call give must be the steps' own bits; where another one shows.
WHOLE_FAULTS = {
    "whole_attention": "layers.0.attention of generated rows",
    "whole_moe": "layers.1.mlp",
    "whole_layers": "layers.0 as a whole",
}


def bit_off(result: Any) -> Any:
    """The last bit of one value of the stream that a whole op gives."""
    y_TD = result[0] if isinstance(result, tuple) else result
    y_TD.view(torch.int16)[-1, 5] ^= 1
    return result


@pytest.mark.parametrize("field", WHOLE_FAULTS)
def test_one_wrong_bit_of_a_whole_op_is_found(tiny_model_dir: Path, field: str) -> None:
    try:
        right = getattr(select_kernels("native", "bfloat16"), field)
    except ConfigError as error:
        pytest.skip(str(error))
    message = rf"^world rank 0: self-test: {WHOLE_FAULTS[field]}: kernels 'wrong' give other bits in one call"
    with pytest.raises(FaultyRankError, match=message):
        run_self_test(tiny_model_dir, "bfloat16", "native", **{field: lambda *args: bit_off(right(*args))})


def test_nan_from_a_kernel_is_a_fault(tiny_model_dir: Path) -> None:
    right = select_kernels("reference", "float32").swiglu
    with pytest.raises(FaultyRankError, match=r"layers\.0\.mlp: .* off by nan"):
        run_self_test(tiny_model_dir, "float32", swiglu=lambda h: right(h) * float("nan"))


def test_a_router_that_passes_over_the_best_is_found(tiny_model_dir: Path) -> None:
    right = select_kernels("reference", "float32").router_topk

    def worst(logit: Tensor, bias: Tensor, rule: object) -> object:
        return right(-logit, bias, rule)  # type: ignore[arg-type]

    with pytest.raises(
        FaultyRankError, match=r"layers\.1\.mlp: the router passed over an expert that scores 1.1 more"
    ):
        run_self_test(tiny_model_dir, "float32", router_topk=worst)  # type: ignore[arg-type]


# -- while serving -------------------------------------------------------------------------------------------

POISON = 77
GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that give NaN for the row of one token."""
    right = decoder.pieces

    def pieces(batch: Batch, *args: Any) -> Pieces:
        x_SD = yield from right(batch, *args)
        if len(x_SD):
            x_SD[batch.token_T[batch.sample_S] == POISON, 3] = torch.nan
        return x_SD

    monkeypatch.setattr(decoder, "pieces", pieces)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tp", [1, 2])
def test_a_bad_row_ends_its_request_alone(tiny_model_dir: Path, tp: int) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=tp)
    with LocalWorld(tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=64) as world:
        good, bad, other = world.generate([[1, 2, 3], [4, POISON], [5, 6]], GREEDY)
        assert (bad.finish, bad.token_ids) == (FinishReason.ERROR, [])
        assert "1 NaN and 0 infinities of 256" in bad.error
        alone = world.generate([[1, 2, 3]], GREEDY)
        assert [good] == alone
        assert other.finish is FinishReason.LENGTH
        assert all(port.load().num_pages_free == 64 for port in world.ports)


@pytest.mark.usefixtures("poisoned")
def test_nothing_but_bad_rows_ends_the_rank(tiny_model_dir: Path) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=2)

    def both() -> None:
        with LocalWorld(tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=64) as world:
            world.generate([[1, POISON], [4, POISON]], GREEDY)

    with pytest.raises(K2Error, match="all 2 rows of a step are bad"):
        both()
