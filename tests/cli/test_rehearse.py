"""`k2dist rehearse`: figures that fit together, and refusals that say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2dist.errors import CapacityError, LayoutError, UsageError
from k2dist.rehearsal import measure
from tests.cli.said import said, said_as_json

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"
DEMO = ("--model", str(Path(__file__).resolve().parents[2] / "k2dist/demo/model"))
LAPTOP = ("rehearse", str(CONFIGS / "laptop.yaml"), *DEMO)
SMALL = ("--decode", "2", "--context", "40", "--steps", "2")


def rehearsed(*arguments: str) -> Any:
    return said_as_json(*LAPTOP, *SMALL, *arguments)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large memory that is read, made small: here it is not the figures that count."""
    monkeypatch.setattr("k2kernels.bench.ceilings._SIZES", {"cpu": (2**20, 64)})
    monkeypatch.setattr("k2kernels.bench.timing.FLUSH_BYTES", {"cpu": 2**20})


def test_parts_are_scaled_to_the_whole_model_and_add_up() -> None:
    found = rehearsed("--layers", "2", "--kernels", "reference")
    assert (found["num_layers"], found["of_layers"]) == (2, 3)
    parts = {part["part"]: part for part in found["parts"]}
    for name, layers, of_layers in (
        ("attention", 2, 3),
        ("experts", 1, 2),
        ("dense MLP", 1, 1),
        ("head", 1, 1),
    ):
        part = parts[name]
        assert (part["layers"], part["of_layers"]) == (layers, of_layers)
        assert part["ms"] == pytest.approx(part["measured_ms"] * of_layers / layers)
    assert sum(part["ms"] for part in found["parts"]) == pytest.approx(found["step_ms"])
    assert sum(part["measured_ms"] for part in found["parts"]) == pytest.approx(found["measured_ms"])
    assert found["decode_tokens_per_s"] == pytest.approx(2 * 2 / found["step_ms"] * 1e3), "2 lanes of 2"
    weights = next(line for line in found["memory"] if line["name"] == "weights")
    assert weights["planned"] == weights["held"]


def test_the_text_says_what_ran_and_what_is_not_in_it() -> None:
    text = said(*LAPTOP, *SMALL, "--rank", "3", "--prompt-tokens", "9")
    assert "rank 3 of 4 (lane 1, tp rank 1)" in text
    assert "layers ran" not in text, "all of them did"
    assert "in compute alone" in text
    for part in ("attention", "router", "dispatch", "experts", "combine", "shared expert", "head", "host"):
        assert f"  {part} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", "4"), "--rank 4: the layout has ranks 0 to 3"),
        (("--layers", "1"), "--layers 1: use 2 .* to 3"),
        (("--layers", "4"), "--layers 4: use 2 .* to 3"),
        (("--decode", "0"), "a step needs at least one row"),
        (("--decode", "300"), "300 rows: this config's steps have at most scheduler.step_tokens=256"),
        (("--steps", "0"), "--steps 0: use at least 1"),
        (("--context", "0"), "--context 0"),
        (("--skew", "-1"), "--skew -1"),
        (("--device", "tpu"), "--device tpu: use cpu or cuda"),
        (("--kernels", "magic"), "magic"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        said(*LAPTOP, *arguments)


def test_a_layout_that_is_not_legal_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("name: wrong\nparallel: {lanes: 1, tp: 3}\n")
    with pytest.raises(LayoutError, match="tp=3"):
        said("rehearse", str(config), *DEMO)


def test_too_little_memory_is_refused_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "usable_bytes", lambda device: 10**9)
    with pytest.raises(CapacityError, match=r"with 2 layers.*experts .* GB.*1.00 GB are usable here"):
        said("rehearse", str(CONFIGS / "h200-2x8.yaml"), "--model", "kimi-k2-instruct")


def test_as_many_layers_as_fit_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "usable_bytes", lambda device: 10**12)
    found = rehearsed()
    assert found["num_layers"] == 3
