"""`k2dist plan` answers with no model on disk, and refuses with the arithmetic and what would work."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from k2dist.demo import MODEL_DIR
from k2dist.errors import ConfigError, LayoutError, UsageError
from k2dist.planner import ClusterPlan
from tests.cli.said import said, said_as_json

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"
H200 = CONFIGS / "h200-2x8.yaml"


def changed(tmp_path: Path, *changes: tuple[str, str]) -> str:
    """The H200 config with some lines changed."""
    text = H200.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path = tmp_path / "changed.yaml"
    path.write_text(text)
    return str(path)


def test_a_plan_is_one_object_that_others_read_by_name() -> None:
    """`deploy` and `doctor` take these; names may be added and never change."""
    shown = said_as_json("plan", str(CONFIGS / "h200-16x8.yaml"))
    for name in (
        "cluster",
        "model",
        "device",
        "kernels",
        "num_nodes",
        "ranks_per_node",
        "world_size",
        "lanes",
    ):
        assert name in shown
    assert shown["load_s"] == shown["start"]["load_s"] > 60
    assert shown["ready_s"] == shown["start"]["ready_s"] > shown["load_s"]
    assert shown["memory"]["ranks"][127]["weights"]["experts"] > 15e9
    assert shown["losses"]["nodes_in_memory"] == 1
    assert shown["estimate"]["serving"]["tpot_s"] > 0
    assert {"decode_bytes", "decode_far_bytes"} <= shown["wire"].keys()
    assert msgspec.convert(shown, ClusterPlan).world_size == 128


def test_a_faster_disk_loads_sooner_by_what_it_reads_faster() -> None:
    slow, fast = (said_as_json("plan", str(H200), "--disk-gb-s", rate)["start"] for rate in ("1", "10"))
    assert slow["node_bytes"] == fast["node_bytes"] == 8 * 77_672_859_488
    assert slow["load_s"] - fast["load_s"] == pytest.approx(slow["node_bytes"] * (1e-9 - 1e-10))
    at_one = next(at for at in fast["by_rate"] if at["disk_rate"] == 1e9)
    assert at_one["load_s"] == slow["load_s"]


def test_text_names_what_binds_and_says_that_it_is_an_estimate() -> None:
    text = said("plan", str(H200), "--prompt-len", "1000", "--output-len", "1000", "--concurrency", "64")
    assert "16 lanes x tp 1 = 16 ranks" in text
    assert "serving 64 at once (--concurrency)" in text
    assert "binds: " in text
    assert "nothing of it is measured" in text


def test_tp_32_is_refused_for_the_block_it_cuts_and_told_what_works(tmp_path: Path) -> None:
    path = changed(tmp_path, ("lanes: 16", "lanes: 1"), ("tp: 1", "tp: 32"), ("num_nodes: 2", "num_nodes: 4"))
    with pytest.raises(LayoutError) as caught:
        said("plan", path)
    assert "18432 / 32 = 576 cuts a 128-block" in str(caught.value)
    assert "on these machines would work: lanes: 2, tp: 16" in str(caught.value)


def test_one_node_of_h200_at_full_context_is_refused_and_told_what_works(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        ("lanes: 16", "lanes: 1"),
        ("tp: 1", "tp: 8"),
        ("num_nodes: 2", "num_nodes: 1"),
        ("num_pages: 11200", "num_pages: 2048"),
    )
    with pytest.raises(LayoutError) as caught:
        said("plan", path)
    fault, less, more = str(caught.value).splitlines()
    assert "2,048 pages x 4,497,408 bytes = 9.21 GB for 131,072 tokens" in fault
    assert "experts 126.87 GB" in fault
    assert less.startswith("on these machines, with less cache: lanes: 1, tp: 8")
    assert more.startswith("the nearest that would work: 2 nodes of 8")


def test_what_is_told_to_work_does(tmp_path: Path) -> None:
    """The nearest layout of a refusal, taken at its word with all its pages."""
    refused = changed(tmp_path, ("lanes: 16", "lanes: 8"), ("num_nodes: 2", "num_nodes: 1"))
    with pytest.raises(LayoutError, match="the nearest that would work: 2 nodes") as caught:
        said("plan", refused)
    told = str(caught.value).splitlines()[-1]
    tp = told.split("tp: ")[1].split(",")[0]
    lanes = told.split("lanes: ")[1].split(",")[0]
    pages = told.split("up to ")[1].split(" ")[0].replace(",", "")
    works = (("lanes: 16", f"lanes: {lanes}"), ("tp: 1", f"tp: {tp}"), ("11200", pages))
    said("plan", changed(tmp_path, *works))
    too_many = (*works[:2], ("11200", str(int(pages) + 1)))
    with pytest.raises(LayoutError, match="use at most"):
        said("plan", changed(tmp_path, *too_many))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--prompt-len", "900000"], UsageError, "a lane's cache holds 716,800"),
        (["--target-tpot", "2"], UsageError, "with one request in each lane a token takes"),
        (["--model", "kimi"], UsageError, "not a name"),
        (["--lose", "3@5"], UsageError, "are of a simulation: add --simulate, --rate or --requests"),
        (["--write", "x.yaml"], UsageError, "belong to --search"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    arguments: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        said("plan", str(H200), *arguments)


def test_devices_without_the_checkpoints_float8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"nodes.device=a100: it has no float8"):
        said("plan", changed(tmp_path, ("device: h200", "device: a100")))
    with pytest.raises(ConfigError, match=r"nodes.device=h300: no such device here; use h200"):
        said("plan", changed(tmp_path, ("device: h200", "device: h300")))


def test_0905_needs_more_cache_for_its_longer_context() -> None:
    """Twice the positions: of what is left, half as many of the longest sequences fit."""
    assert "5.5 times the longest context" in said("plan", str(H200))
    assert "2.7 times the longest context" in said("plan", str(H200), "--model", "kimi-k2-instruct-0905")


def test_a_rate_is_simulated_and_its_curves_are_drawn(tmp_path: Path) -> None:
    laptop, demo = str(CONFIGS / "laptop.yaml"), str(MODEL_DIR)
    curves = tmp_path / "curves.html"
    asked = ("--model", demo, "--rate", "50", "--requests", "30", "--prompt-len", "40", "--output-len", "10")
    text = said("plan", laptop, *asked, "--plot", str(curves))
    assert "30 finished, 0 refused" in text
    assert curves.read_text().count("<svg") == 7
    shown = said_as_json("plan", laptop, *asked, "--lose", "2@0.2")
    assert shown["num_finished"] == 30
    assert shown["loss"]["lane"] == 1


def test_a_trace_is_simulated_as_it_stands(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"at_s": at, "prompt_len": 20, "output_len": 5} for at in (0.0, 0.1, 7.5)]
    trace.write_text("\n".join(msgspec.json.encode(line).decode() for line in lines))
    laptop = (str(CONFIGS / "laptop.yaml"), "--model", str(MODEL_DIR))
    shown = said_as_json("plan", *laptop, "--simulate", str(trace))
    assert (shown["num_requests"], shown["num_finished"]) == (3, 3)
    assert shown["duration_s"] > 7.5
    with pytest.raises(UsageError, match="leave out --rate"):
        said("plan", *laptop, "--simulate", str(trace), "--rate", "1")
    with pytest.raises(UsageError, match="--lose 9@1: use RANK@SECONDS"):
        said("plan", *laptop, "--simulate", str(trace), "--lose", "9@1")


def test_a_search_writes_a_config_that_can_be_planned(tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    text = said("plan", "--search", "--hardware", "b200", "--nodes", "1", "--write", str(best))
    assert "layouts that fit" in text
    assert "b200-1x8: kimi-k2-instruct on one node of 8 x b200" in said("plan", str(best))
    with pytest.raises(UsageError, match="it exists"):
        said("plan", "--search", "--hardware", "b200", "--nodes", "1", "--write", str(best))
    with pytest.raises(UsageError, match="--hardware None: name the devices"):
        said("plan", "--search")
    with pytest.raises(UsageError, match="give a cluster YAML, or --search"):
        said(
            "plan",
        )
