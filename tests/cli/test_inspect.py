"""`k2dist inspect` says what ranks would read and hold, of real files and of none."""

from functools import partial
from pathlib import Path

import pytest
import torch

from k2dist.config import read_architecture
from k2dist.errors import CheckpointError, LayoutError, UsageError
from k2dist.parallel import first_layout, shard_plan
from tests.cli.said import said, said_as_json

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"


say, say_json = partial(said, "inspect"), partial(said_as_json, "inspect")


def test_every_rank_of_a_config_has_its_line() -> None:
    lines = say("shards", str(CONFIGS / "h200-2x8.yaml")).splitlines()
    assert lines[0] == "kimi-k2-instruct: 1,029,190,969,552 bytes in files, those k2dist would write"
    assert lines[1] == "16 ranks, 16 lanes x tp 1"
    assert len(lines) == 3 + 16 + 1
    assert lines[3].split()[:7] == ["0", "0", "0", "24", "9,983", "61", "77,672,859,488"]
    assert "129,600 expert without a slot on this rank" in lines[3]
    assert lines[-1].endswith("1.21 times the files")


def test_numbers_come_as_data_too() -> None:
    shown = say_json("shards", "--lanes", "1", "--tp", "8", "--expert-only-ranks", "8")
    assert (shown["model"], len(shown["ranks"])) == ("kimi-k2-instruct", 16)
    laned, alone = shown["ranks"][7], shown["ranks"][8]
    assert (laned["lane"], laned["tp_rank"], laned["num_tensors"]) == (0, 7, 9_983)
    assert (alone["lane"], alone["tp_rank"], alone["num_tensors"]) == (None, None, 24 * 60 * 6)
    assert alone["skips"]["this rank serves no lane"] == 1_343
    assert all(rank["reads"] == [] for rank in shown["ranks"])


def test_ranges_are_those_of_the_files_that_are_there(tiny_model_dir: Path) -> None:
    """The bytes at each range of one rank are what the loader reads."""
    from k2dist.checkpoint import load_shard

    arguments = ["shards", "--lanes", "2", "--tp", "2", "--model", str(tiny_model_dir), "--rank", "3"]
    shown = say_json(*arguments)
    assert shown["files"] == f"those in {tiny_model_dir}"
    architecture = read_architecture(tiny_model_dir)
    tensors = load_shard(
        tiny_model_dir, shard_plan(architecture, first_layout(architecture, lanes=2, tp=2), 3)
    )
    (rank,) = shown["ranks"]
    assert [read["name"] for read in rank["reads"]] == list(tensors)
    for read in rank["reads"]:
        data = (tiny_model_dir / read["file"]).read_bytes()
        starts = [read["begin"] + run * read["stride"] for run in range(read["num_runs"])]
        found = b"".join(data[start : start + read["run_bytes"]] for start in starts)
        assert found == tensors[read["name"]].view(torch.uint8).numpy().tobytes(), read["name"]
    text = say(*arguments)
    assert "self_attn.o_proj.weight F8_E4M3 [256, 1024] [0:256, 512:1024]" in text
    assert " + 256 x 512, every 1,024" in text


def test_files_that_are_not_what_they_should_be_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model-2-of-3.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing shard"):
        say("shards", "--lanes", "1", "--model", str(tmp_path))


def test_a_config_alone_is_enough_of_a_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    with_files = say_json("shards", "--lanes", "1", "--model", str(tiny_model_dir), "--rank", "0")
    without = say_json("shards", "--lanes", "1", "--model", str(tmp_path), "--rank", "0")
    assert without["files"] == "those k2dist would write"
    assert without["ranks"] == with_files["ranks"], "the tiny model was written by k2dist"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shards"], "give a cluster YAML, or --lanes"),
        (["shards", str(CONFIGS / "laptop.yaml"), "--lanes", "2"], "give a cluster YAML, or --lanes"),
        (["shards", "--lanes", "0"], "--lanes 0 .*>= 1"),
        (["shards", "--lanes", "1", "--rank", "1"], "--rank 1: the layout has ranks 0 to 0"),
        (["shards", "--lanes", "1", "--model", "kimi"], "--model kimi: no such directory, and not a name"),
    ],
)
def test_bad_usage_is_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        say(*arguments)


def test_an_illegal_layout_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(LayoutError, match="18432 / 32 = 576 cuts a 128-block"):
        say("shards", "--lanes", "1", "--tp", "32")
