"""What the same bits cost: the orders compute the same, differ as they say, and bytes are what was sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from k2dist.bench import bits
from k2dist.bench.bits import FARTHEST, SAME_BITS, BitsReport, measure, published_bytes
from k2dist.bench.bits_world import BitsWorld, Order, decode_batch, num_places
from k2dist.cli.app import app
from k2dist.comm import CapacityRule
from k2dist.config import read_architecture
from k2dist.demo import MODEL_DIR
from k2dist.engine.kernels import select_kernels
from k2dist.errors import LayoutError
from k2dist.model.batch import Batch
from k2dist.parallel import first_layout
from k2dist.planner.layer_bytes import EvenLayer

ORDERS = ["same bits", "padded exchange", "library kernels", "all-reduce", "reduced returns", "all of these"]


@pytest.fixture(scope="module")
def report() -> BitsReport:
    return measure(MODEL_DIR, lanes=1, tp=2, kernels="reference", batches=(1, 6), prompt_rows=20, num_turns=2)


def test_every_order_takes_every_step(report: BitsReport) -> None:
    assert [(case.step, case.num_rows) for case in report.cases] == [
        ("prompt", 20),
        ("decode", 1),
        ("decode", 6),
    ]
    for case in report.cases:
        assert [order.order for order in case.orders] == ORDERS
        assert all(order.step_ms > 0 and order.same_bits_ratio > 0 for order in case.orders)
        assert case.orders[0].same_bits_ratio == 1.0


def test_every_order_is_the_same_mathematics(report: BitsReport) -> None:
    for case in report.cases:
        assert case.orders[0].off == case.orders[1].off == 0.0, "frames keep the bits"
        assert all(order.off < FARTHEST / 10 for order in case.orders)
        assert case.orders[2].off > 0.0, "a library's sums have an order of their own"


def test_a_ring_sends_twice_what_reduce_rows_does(report: BitsReport) -> None:
    """Both of two ranks: half of all rows in one case, all of them in the other."""
    architecture = read_architecture(MODEL_DIR)
    num_sums = 1 + architecture.num_layers + architecture.first_dense_layers  # embedding, attention, dense
    for case in report.cases:
        kept, padded, library, all_reduce, returns, fastest = case.orders
        assert kept.lane_bytes == padded.lane_bytes == library.lane_bytes == returns.lane_bytes
        assert kept.lane_bytes == num_sums * case.num_rows * architecture.hidden_size * 4
        assert all_reduce.lane_bytes == fastest.lane_bytes == 2 * kept.lane_bytes


def test_returns_send_a_row_for_each_that_came_or_for_each_pair(report: BitsReport) -> None:
    """Out: e4m3 with 4 bytes of scale per 128 channels, and a slot (a weight) per expert. Home: bfloat16.

    Orders with other bits may choose another expert where two are nearly as good, so their numbers are near.
    """
    architecture = read_architecture(MODEL_DIR)
    width, top_k = architecture.hidden_size, architecture.top_k
    out, home = width + 4 * width // 128 + 4 * top_k, 2 * width
    for case in report.cases:
        kept, padded, *of_pairs, returns, fastest = (order.expert_bytes for order in case.orders)
        most_rows = architecture.num_moe_layers * case.num_rows * 2
        for sent in (kept, *of_pairs):
            splits = [(rows, *divmod(sent - rows * out, home)) for rows in range(1, most_rows + 1)]
            assert any(rest == 0 and rows <= pairs <= top_k * rows for rows, pairs, rest in splits)
            assert sent == pytest.approx(kept, rel=0.1)
            assert sent < padded
        for sent in (returns, fastest):
            assert sent % (out + 4 * top_k + home) == 0
            assert sent == pytest.approx(returns, rel=0.1)
            assert 0 < sent <= most_rows * (out + 4 * top_k + home)


def test_frames_of_a_step_are_as_long_as_their_capacity_says(report: BitsReport) -> None:
    """Both of two ranks, in each layer, whatever the router chose; half of the rows are the most of any."""
    architecture = read_architecture(MODEL_DIR)
    row_bytes, out_bytes = architecture.hidden_size * (1 + 4 / 128), 2 * architecture.hidden_size
    for case in report.cases:
        num_rows = -(-case.num_rows // 2)
        capacity = CapacityRule(1.25, architecture.top_k, 0.5).capacity(num_rows)
        layer = EvenLayer(num_rows, 2, architecture.top_k, int(row_bytes), out_bytes)
        sent = case.orders[1].expert_bytes
        assert sent == 2 * architecture.num_moe_layers * layer.padded(capacity).total


def test_bytes_of_the_published_model_are_reckoned_by_hand() -> None:
    """64 rows, 8 experts each, 16 ranks. A row is 7168 + 4 x 56 bytes and 8 slots, an output 14336."""
    exact, padded, reduced = published_bytes(64, 16)
    rows_away = 64 * 15 * (1 - (15 / 16) ** 8)
    assert exact.out_bytes == round(rows_away * (7168 + 224 + 32))
    assert exact.home_bytes == 64 * 8 * 15 // 16 * 14336
    assert reduced.out_bytes == round(rows_away * (7168 + 224 + 64))
    assert reduced.home_bytes == round(rows_away * 14336)
    assert padded.out_bytes == 15 * 64 * (7168 + 224 + 36), "room for all rows"
    assert padded.home_bytes == 15 * 82 * 14336


def first_row(batch: Batch) -> Batch:
    """Of a decode batch, alone."""
    return dataclasses.replace(
        batch,
        token_T=batch.token_T[:1],
        position_T=batch.position_T[:1],
        write_T=batch.write_T[:1],
        shares=(1, 0),
        decode_row_R=batch.decode_row_R[:1],
        decode_length_R=batch.decode_length_R[:1],
        decode_page_RP=batch.decode_page_RP[:1],
        sample_S=batch.sample_S[:1],
    )


def test_the_price_buys_something() -> None:
    """A row alone and in company: the same bits in one order, others in a library's."""
    architecture = read_architecture(MODEL_DIR)
    layout = first_layout(architecture, lanes=1, tp=2)
    together = decode_batch(9, 70, 2, architecture.vocab_size)
    kernels = select_kernels("reference", "float32")
    with BitsWorld(MODEL_DIR, layout, kernels, num_places=num_places(9, 70)) as world:
        for order in (SAME_BITS, Order("library kernels", kernels=True)):
            alone, among = world.step(order, first_row(together))[0], world.step(order, together)[0]
            assert torch.equal(alone, among) == (order is SAME_BITS)
            assert torch.allclose(alone, among, atol=1e-3)


def test_kernels_that_are_no_reference_have_no_library_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str, dtype: str) -> object:
        return dataclasses.replace(select_kernels(name, dtype), name="other")

    monkeypatch.setattr(bits, "select_kernels", other)
    report = measure(MODEL_DIR, lanes=2, tp=1, batches=(2,), prompt_rows=3, num_turns=1)
    assert report.kernels == "other"
    for case in report.cases:
        assert [order.order for order in case.orders] == [name for name in ORDERS if "kernels" not in name]
        assert {order.lane_bytes for order in case.orders} == {0}, "at tp 1 nothing is reduced"


def test_an_illegal_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="tp=3"):
        measure(MODEL_DIR, tp=3)


def test_the_command_prints_a_line_for_each_order_and_gives_data(tmp_path: Path) -> None:
    arguments = ["bench", "bits", "--kernels", "reference", "--lanes", "1", "--tp", "1", "--batch", "2"]
    arguments += ["--prompt-rows", "3"]
    shown = CliRunner().invoke(app, [*arguments, "--turns", "1"])
    lines = [line.strip() for line in shown.output.splitlines()]
    for step in ("prompt 3", "decode 2"):
        found = [line.removeprefix(step).strip() for line in lines if line.startswith(step)]
        assert [next(name for name in ORDERS if line.startswith(name)) for line in found] == ORDERS
    result = CliRunner().invoke(app, [*arguments, "--turns", "1", "--json"])
    report = msgspec.convert(msgspec.json.decode(result.output)["bits"], BitsReport)
    assert (report.lanes, report.tp, report.num_ranks, report.num_turns) == (1, 1, 1, 1)
    assert {order.expert_bytes for case in report.cases for order in case.orders} == {0}, "one rank has all"
