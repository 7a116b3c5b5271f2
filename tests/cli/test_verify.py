"""`k2dist verify`: what it finds, what it writes, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2dist.checkpoint.manifest import MANIFEST_NAME
from k2dist.checkpoint.names import INDEX_NAME
from k2dist.cli import app, comparison
from k2dist.config import read_architecture

LAST = "model-3-of-3.safetensors"
DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`k2dist verify` with these arguments: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["k2dist", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.run()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)


def spoil(model_dir: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(model_dir / LAST)
    change(tensors)
    save_file(tensors, model_dir / LAST, metadata={"format": "pt"})


def test_a_checkpoint_is_listed_and_then_held_to_its_list(model_dir: Path, run: Run) -> None:
    """With transformers, which the tests have: its logits are the same."""
    pytest.importorskip("transformers")
    code, out, err = run(model_dir, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["is_new_manifest"]
    assert report["manifest"] == str(model_dir / MANIFEST_NAME)
    assert 0 < report["transformers"]["off"] < 1e-4
    assert report["num_bytes"] == sum(
        value.nbytes for path in model_dir.glob("*.safetensors") for value in load_file(path).values()
    )
    before = (model_dir / MANIFEST_NAME).read_bytes()
    code, out, err = run(model_dir)
    assert (code, err) == (0, "")
    assert "nothing wrong" in out
    assert "checksums as in" in out
    assert "logits as of transformers" in out
    assert (model_dir / MANIFEST_NAME).read_bytes() == before


@pytest.mark.usefixtures("no_transformers")
def test_the_manifest_may_lie_elsewhere(model_dir: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "sums.json"
    code, out, _ = run(model_dir, "--manifest", path)
    assert code == 0
    assert f"checksums written to {path}" in out
    assert "transformers is not installed" in out
    assert not (model_dir / MANIFEST_NAME).exists()
    assert run(model_dir, "--manifest", path)[0] == 0


@pytest.mark.usefixtures("no_transformers")
def test_a_changed_byte_is_named_and_the_manifest_kept(model_dir: Path, run: Run) -> None:
    assert run(model_dir)[0] == 0
    before = (model_dir / MANIFEST_NAME).read_bytes()
    spoil(model_dir, lambda tensors: tensors[DOWN].view(torch.uint8)[3, 4:5].bitwise_xor_(1))
    code, out, err = run(model_dir)
    assert (code, out) == (1, "")
    assert err == f"k2dist: error: {model_dir}: {DOWN}: its bytes are not those of the manifest\n"
    code, out, _ = run(model_dir, "--json")
    assert code == 1
    assert json.loads(out)["error"]["kind"] == "CheckpointError"
    assert (model_dir / MANIFEST_NAME).read_bytes() == before


@pytest.mark.usefixtures("no_transformers")
def test_nothing_is_listed_of_a_checkpoint_with_faults(model_dir: Path, run: Run) -> None:
    spoil(model_dir, lambda tensors: tensors[f"{DOWN}_scale_inv"].fill_(-1.0))
    code, _, err = run(model_dir)
    assert code == 1
    assert f"{DOWN}_scale_inv: -1.0 at [0, 0], should be finite and positive" in err
    assert not (model_dir / MANIFEST_NAME).exists()


@pytest.mark.usefixtures("no_transformers")
def test_many_faults_are_a_line_each_and_counted(model_dir: Path, run: Run) -> None:
    def all_scales(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name.endswith("_scale_inv"):
                value.zero_()

    spoil(model_dir, all_scales)
    lines = run(model_dir)[2].splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("and 24 faults more")


def test_a_directory_that_is_not_there(tmp_path: Path, run: Run) -> None:
    code, _, err = run(tmp_path / "absent")
    assert code == 1
    assert "no such directory" in err


def test_an_unknown_option_is_bad_usage(model_dir: Path, run: Run) -> None:
    assert run(model_dir, "--manifets", "x")[0] == 2


def test_logits_that_differ_are_a_fault(model_dir: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are right; config.json says something else of them than the two sides were given."""
    pytest.importorskip("transformers")
    right = comparison.read_config

    monkeypatch.setattr(comparison, "read_config", lambda path: {**right(path), "routed_scaling_factor": 2.0})
    code, _, err = run(model_dir)
    assert code == 1
    assert "logits are" in err
    assert "away from transformers'" in err


def test_a_model_that_does_not_fit_is_not_compared(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    architecture = read_architecture(model_dir)
    memory = psutil.virtual_memory()
    free = comparison.bytes_needed(architecture) - 1
    monkeypatch.setattr(comparison.psutil, "virtual_memory", lambda: memory._replace(available=free))
    found = comparison.compare(model_dir, architecture)
    assert found.off is None
    assert f"{free:,} are free" in found.reason


def test_memory_needed_grows_with_the_weights(tiny_model_dir: Path) -> None:
    architecture = read_architecture(tiny_model_dir)
    wider = msgspec.structs.replace(architecture, num_experts=24)
    more_weights = 12 * 2 * 3 * 128 * 256  # experts x MoE layers x linears
    more_bytes = comparison.bytes_needed(wider) - comparison.bytes_needed(architecture)
    assert 13 * more_weights < more_bytes < 13.5 * more_weights, "as stored, and three times in float32"


# -- checksums that came with the files ----------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def list_sums(model_dir: Path) -> int:
    files = sorted(model_dir.glob("*.safetensors"))
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in files]
    (model_dir / "SHA256SUMS").write_text("".join(lines))
    return len(files)


def note_downloads(model_dir: Path) -> int:
    """As huggingface_hub does: revision, etag, time; the etag of a small file is a git hash."""
    notes = model_dir / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    files = sorted(model_dir.glob("*.safetensors"))
    for path in files:
        (notes / f"{path.name}.metadata").write_text(f"{'a' * 40}\n{sha256_of(path)}\n1752.5\n")
    (notes / "config.json.metadata").write_text(f"{'a' * 40}\n{'b' * 40}\n1752.5\n")
    return len(files)


@pytest.mark.parametrize("publish", [list_sums, note_downloads])
@pytest.mark.usefixtures("no_transformers")
def test_a_flipped_bit_is_found_by_a_published_checksum(
    model_dir: Path, run: Run, publish: Callable[[Path], int]
) -> None:
    count = publish(model_dir)
    code, out, _ = run(model_dir)
    assert code == 0
    assert f"{count} published SHA-256 of files hold" in out
    (model_dir / MANIFEST_NAME).unlink()
    flip_bit(model_dir / LAST)
    code, _, err = run(model_dir)
    assert code == 1
    assert f"{LAST}: its SHA-256 is {sha256_of(model_dir / LAST)}, and " in err
    assert "fetch it again" in err
    assert not (model_dir / MANIFEST_NAME).exists(), "wrong bytes were made the norm"


@pytest.mark.usefixtures("no_transformers")
def test_a_listed_file_that_is_missing_and_a_list_that_is_none(model_dir: Path, run: Run) -> None:
    list_sums(model_dir)
    sums = model_dir / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'c' * 64}  gone.safetensors\n")
    code, _, err = run(model_dir)
    assert (code, "gone.safetensors: missing, and SHA256SUMS lists it" in err) == (1, True)
    sums.write_text("<html>not found</html>\n")
    code, _, err = run(model_dir)
    assert (code, "SHA256SUMS: line 1 is not a SHA-256 and a file name" in err) == (1, True)


@pytest.mark.usefixtures("no_transformers")
def test_a_file_that_nothing_reads_is_mentioned(model_dir: Path, run: Run) -> None:
    shutil.copy(model_dir / LAST, model_dir / "old.safetensors")
    code, out, _ = run(model_dir)
    assert code == 0
    assert "old.safetensors: not in the index, and never read" in out
    assert "no checksums of files came with them" in out


@pytest.mark.usefixtures("no_transformers")
def test_a_total_size_that_is_not_the_files_is_mentioned_and_one_that_is_no_number_refused(
    model_dir: Path, run: Run
) -> None:
    path = model_dir / INDEX_NAME
    index = json.loads(path.read_text())
    right = index["metadata"]["total_size"]
    assert "index's total_size" not in run(model_dir)[1]
    path.write_text(json.dumps(index | {"metadata": {"total_size": right + 8}}))
    code, out, _ = run(model_dir)
    assert code == 0
    assert f"the index's total_size is {right + 8:,}, and its files hold {right:,} bytes" in out
    path.write_text(json.dumps(index | {"metadata": {}}))
    assert run(model_dir)[0] == 0
    path.write_text(json.dumps(index | {"metadata": {"total_size": "much"}}))
    code, _, err = run(model_dir)
    assert (code, "$.metadata.total_size" in err) == (1, True)
