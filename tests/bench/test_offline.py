"""A model in this process: figures that belong together, floors that can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from k2dist.bench.offline import OfflineReport, measure, read_bandwidth
from k2dist.bench.weight_floor import step_bytes, touched_experts
from k2dist.cli.app import app
from k2dist.config import read_architecture
from k2dist.demo import MODEL_DIR
from k2dist.engine.kernels import select_kernels
from k2dist.errors import LayoutError, UsageError
from k2dist.parallel.published import published_tensors


@pytest.fixture(scope="module")
def report() -> OfflineReport:
    return measure(MODEL_DIR, prompt_len=20, decode_tokens=5, batches=(1, 4))


def test_each_batch_decodes_as_many_tokens_as_asked(report: OfflineReport) -> None:
    assert [cost.batch for cost in report.batches] == [1, 4]
    for cost in report.batches:
        assert cost.prompt_tokens_per_s > 0
        assert cost.decode_tokens_per_s > 0
        assert abs(cost.num_steps - 5) <= 1, "a step more or less: the counters are read while steps go on"
        assert cost.step_ms > 0
        assert cost.device_ms > 0
        assert cost.host_ms >= 0


def test_the_floor_is_what_reading_the_touched_weights_takes(report: OfflineReport) -> None:
    architecture = read_architecture(MODEL_DIR)
    one, four = report.batches
    assert one.experts_touched == pytest.approx(architecture.top_k), "exactly, whatever was chosen"
    assert architecture.top_k < four.experts_touched < min(architecture.num_experts, 4 * architecture.top_k)
    assert one.floor_bytes < four.floor_bytes < report.checkpoint_bytes
    for cost in report.batches:
        floor_ms = cost.floor_bytes / report.read_bytes_per_s * 1e3
        assert cost.floor_share == pytest.approx(floor_ms / cost.step_ms)


def test_memory_is_set_against_the_checkpoint(report: OfflineReport) -> None:
    assert report.peak_rss_bytes >= report.start_rss_bytes > 0
    assert report.pss_bytes > 0
    added = report.peak_rss_bytes - report.start_rss_bytes
    assert report.memory_ratio == pytest.approx(added / report.checkpoint_bytes)
    files = sum(path.stat().st_size for path in MODEL_DIR.glob("*.safetensors"))
    assert 0.99 < report.checkpoint_bytes / files <= 1.0, "the files hold headers too"


def test_random_weights_on_any_layout_decode_to_the_end(tiny_model_dir: Path) -> None:
    """A batch smaller than the lanes leaves one idle; these prompts take several chunks."""
    seen: list[tuple[int, int]] = []
    report = measure(
        tiny_model_dir,
        lanes=2,
        tp=2,
        prompt_len=700,
        decode_tokens=1,
        batches=(1, 3),
        show=lambda done, total: seen.append((done, total)),
    )
    assert (report.lanes, report.tp, report.kernels) == (2, 2, select_kernels("auto", "bfloat16").name)
    assert [cost.batch for cost in report.batches] == [1, 3]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_step_reads_what_its_rows_touch_once() -> None:
    architecture = read_architecture(MODEL_DIR)
    tensors = list(published_tensors(architecture))
    embedding = 2 * architecture.vocab_size * architecture.hidden_size
    experts = [tensor for tensor in tensors if tensor.expert is not None]
    always = sum(tensor.num_bytes for tensor in tensors) - embedding - sum(t.num_bytes for t in experts)
    one = sum(t.num_bytes for t in experts if (t.layer, t.expert) == (architecture.first_dense_layers, 0))
    row = 2 * architecture.hidden_size
    assert step_bytes(architecture, 3, [4.0, 1.5]) == always + 3 * row + 5.5 * one
    everything = [float(architecture.num_experts)] * architecture.num_moe_layers
    assert step_bytes(architecture, architecture.vocab_size, everything) == sum(t.num_bytes for t in tensors)


def test_touched_experts_follow_from_their_shares() -> None:
    even = [[10, 10, 10, 10]]
    assert touched_experts(even, 1, 1) == [1.0]
    assert touched_experts(even, 2, 1) == [2.0]
    assert touched_experts(even, 1, 2) == [4 * (1 - 0.75**2)]
    assert touched_experts([[8, 8, 0, 0], [8, 4, 2, 2]], 2, 5) == pytest.approx(
        [2.0, 1 + (1 - 0.5**5) + 2 * (1 - 0.75**5)]
    )


def test_a_read_has_a_speed() -> None:
    assert read_bandwidth(2**20, 2) > 0


def test_a_prompt_beyond_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match="the context of this model holds 131072"):
        measure(MODEL_DIR, prompt_len=200_000)


def test_an_illegal_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="lanes=0"):
        measure(MODEL_DIR, lanes=0)


def test_the_command_prints_a_line_for_each_batch_and_gives_data() -> None:
    arguments = [
        "bench",
        "offline",
        "--prompt-len",
        "3",
        "--decode-tokens",
        "2",
        "--batch",
        "1",
        "--batch",
        "2",
    ]
    shown = CliRunner().invoke(app, arguments)
    rows = [line.split() for line in shown.output.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert [len(row) for row in rows] == [9, 9]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    report = msgspec.convert(msgspec.json.decode(result.output)["offline"], OfflineReport)
    assert (report.prompt_len, report.decode_tokens) == (3, 2)
    assert [cost.batch for cost in report.batches] == [1, 2]
