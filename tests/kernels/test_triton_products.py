"""Triton's matrix products: against their references, the same bits from every tile, and free of company.

Row invariance is asked with numbers whose products over one piece of K are exact, so that nothing but the
order of the pieces can move a bit: the matrix product inside the interpreter has an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import (
    QuantisedRows,
    StoredWeight,
    absorb,
    act_quant,
    fp8_gemm,
    grouped_gemm,
    linear_bf16,
    product,
    router_logits,
)
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


def stored(rows: int, cols: int, block: int = 128) -> StoredWeight:
    w_NK = (torch.randn(rows, cols) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    return StoredWeight(w_NK, torch.rand(-(-rows // block), -(-cols // block)) / 100 + 1e-3, block)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def small(*shape: int) -> Tensor:
    """Integers whose products and their sums over 256 of them are exact; on a device any numbers.

    There the tensor core's own order within a piece is asked for too.
    """
    if torch.get_default_device().type == "cuda":
        return torch.randn(shape) * 3
    return torch.randint(-8, 9, shape).float()


def small_fp8(rows: int, cols: int) -> StoredWeight:
    """Such integers, with scales that are not."""
    scale_nk = torch.rand(-(-rows // 128), -(-cols // 128)) + 0.1
    return StoredWeight(small(rows, cols).to(torch.float8_e4m3fn), scale_nk, 128)


def small_rows(num_rows: int, width: int) -> QuantisedRows:
    scale_Tk = torch.rand(num_rows, -(-width // 128)) + 0.1
    return QuantisedRows(small(num_rows, width).to(torch.float8_e4m3fn), scale_Tk, 128)


def tolerance(device: torch.device) -> float:
    """Of e4m3 products: a Hopper tensor core keeps some 14 bits of a sum over one scale block."""
    return 1e-4 if device.type == "cuda" else 2e-6


def close(y: Tensor, wanted: Tensor, *, share: float) -> bool:
    """Whether errors are below `share` of the largest result; NaN is not."""
    return bool((y.double() - wanted.double()).abs().max() <= share * wanted.double().abs().max())


def exact_in_pieces(num_rows: int, width: int, piece: int) -> Tensor:
    """Small integers, each piece of a row times its own power of two: sums over a piece are exact."""
    x_TK = small(num_rows, width)
    power = torch.randint(-12, 13, (num_rows, -(-width // piece))).float()
    return x_TK * torch.exp2(power).repeat_interleave(piece, dim=1)[:, :width]


@pytest.mark.parametrize(
    ("parts", "width", "num_rows"),
    [((256, 192), 384, 5), ((576,), 256, 1), ((100, 60), 300, 37), ((130,), 128, 70)],
    ids=["q_a with kv_a", "576 rows, 5 scales", "parts that end inside a block", "more rows than a tile"],
)
def test_fp8_gemm_equals_its_reference(
    parts: tuple[int, ...], width: int, num_rows: int, device: torch.device
) -> None:
    weights = [stored(rows, width) for rows in parts]
    plain, laid_out = fp8_gemm.prepare(weights), fp8_gemm.prepare_stored(weights)
    x = act_quant.reference(torch.randn(num_rows, width), 128)
    wanted = fp8_gemm.reference(x, plain, torch.float32)
    assert close(
        fp8_gemm.launch(x, laid_out, torch.float32), wanted, share=1e-4 if device.type == "cuda" else 2e-6
    )
    rounded = fp8_gemm.launch(x, laid_out, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert close(rounded, wanted, share=2**-8)
    for dtype in (torch.float32, torch.bfloat16):
        x_TK = torch.randn(num_rows, width).to(dtype)
        exact = x_TK.double() @ plain.w_NK.double().T
        assert close(fp8_gemm.launch(x_TK, laid_out, torch.float32), exact, share=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_equals_float64(dtype: torch.dtype, device: torch.device) -> None:
    x_TK, w_NK = torch.randn(21, 100).to(dtype), torch.randn(150, 100).to(dtype)
    y_TN = linear_bf16.launch(x_TK, linear_bf16.prepare_stored(w_NK), torch.float32)
    assert close(y_TN, x_TK.double() @ w_NK.double().T, share=2e-6)
    mixed_TN = linear_bf16.launch(x_TK.bfloat16(), w_NK.float(), torch.float32)
    assert close(mixed_TN, x_TK.bfloat16().double() @ w_NK.double().T, share=2e-6)


@pytest.mark.parametrize("arithmetic", [product.SCALED, product.BFLOAT16, product.PLAIN_FLOAT32])
def test_every_tile_gives_a_linear_the_same_bits(arithmetic: str, device: torch.device) -> None:
    """Any count of rows chooses one of these tiles, so no row's bits know how many others there are."""
    num_rows, width = 19, 300
    piece = product.piece_of_k(arithmetic, 128)
    x_TK = exact_in_pieces(num_rows, width, piece)
    if arithmetic == product.SCALED:
        x: Tensor | QuantisedRows = small_rows(num_rows, width)
        w = fp8_gemm.prepare_stored([small_fp8(150, width)])
    else:
        dtype = torch.bfloat16 if arithmetic == product.BFLOAT16 else torch.float32
        x = x_TK.to(dtype)
        w = fp8_gemm.prepare_stored([StoredWeight(small(150, width).to(dtype))])
    tiles = product.all_tiles(arithmetic)
    results = [bits(fp8_gemm.launch(x, w, torch.float32, tile)) for tile in tiles]
    assert len(tiles) > 1
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("arithmetic", [product.SCALED, product.BFLOAT16, product.PLAIN_FLOAT32])
def test_no_count_of_rows_chooses_another_tile(arithmetic: str) -> None:
    tiles = product.all_tiles(arithmetic)
    counts = [*range(1, 300), 4096, 1 << 22]
    outputs = (1, 576, product.NARROW - 1, product.NARROW, 1 << 20)
    assert {product.choose_tiles(arithmetic, t, n) for t in counts for n in outputs} == set(tiles)


def _grouped(counts: list[int], parts: tuple[int, ...], width: int) -> tuple[list[list[StoredWeight]], int]:
    return [[stored(rows, width) for rows in parts] for _ in counts], sum(parts)


@pytest.mark.parametrize(
    ("counts", "parts", "width"),
    [
        ([3, 0, 17, 0, 1], (128, 128), 256),
        ([0, 0, 40], (100, 60), 300),
        ([1], (24,), 40),
        ([0, 2, 0], (64,), 64),
    ],
)
def test_each_row_meets_its_slots_weights(
    counts: list[int], parts: tuple[int, ...], width: int, device: torch.device
) -> None:
    slots, num_outputs = _grouped(counts, parts, width)
    plain = grouped_gemm.prepare_grouped(slots, num_outputs)
    laid_out = grouped_gemm.prepare_stacked(slots, num_outputs)
    x = act_quant.reference(torch.randn(sum(counts), width), 128)
    y_MN = grouped_gemm.launch(x, torch.tensor(counts), laid_out, torch.float32)
    wanted = grouped_gemm.reference(x, torch.tensor(counts), plain, torch.float32)
    assert close(y_MN, wanted, share=tolerance(device))
    x_MK = torch.randn(sum(counts), width)
    y_MN = grouped_gemm.launch(x_MK, torch.tensor(counts), laid_out, torch.float32)
    assert close(y_MN, grouped_gemm.reference(x_MK, torch.tensor(counts), plain, torch.float32), share=2e-6)


def test_a_slots_rows_have_the_bits_of_a_plain_linear_in_every_tile(device: torch.device) -> None:
    """Other slots' weights are NaN where nobody may look: an expert without rows costs nothing either."""
    counts, width = [3, 0, 18], 256
    slots = [[small_fp8(150, width)] for _ in counts]
    laid_out = grouped_gemm.prepare_stacked(slots, 150)
    laid_out.w_eNK[1].view(torch.uint8).fill_(255)
    x = small_rows(21, width)
    alone = [
        fp8_gemm.launch(x[rows], fp8_gemm.prepare_stored(slots[slot]), torch.float32)
        for slot, rows in ((0, torch.arange(3)), (2, torch.arange(3, 21)))
    ]
    for tile in product.all_tiles(product.SCALED):
        y_MN = grouped_gemm.launch(x, torch.tensor(counts), laid_out, torch.float32, tile)
        assert torch.equal(bits(y_MN), bits(torch.cat(alone))), tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_absorb_equals_its_reference_on_a_slice_of_the_query(
    dtype: torch.dtype, device: torch.device
) -> None:
    q_THD = torch.randn(37, 3, 200).to(dtype)
    q_THD[..., 130:] = torch.nan
    w_HKN = torch.randn(3, 130, 70).to(dtype)
    y_THN = absorb.launch(q_THD[..., :130], w_HKN)
    wanted = torch.einsum("thk,hkn->thn", q_THD[..., :130].double(), w_HKN.double())
    assert y_THN.dtype == dtype
    assert close(y_THN, wanted, share=2**-8 if dtype == torch.bfloat16 else 2e-6)


def test_every_tile_gives_absorb_the_same_bits(device: torch.device) -> None:
    x_THK = exact_in_pieces(19 * 3, 130, 64).view(19, 3, 130).bfloat16()
    w_HKN = small(3, 130, 70).bfloat16()
    results = [bits(absorb.launch(x_THK, w_HKN, tile)) for tile in product.all_tiles(product.BFLOAT16)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_logits_have_float32s_accuracy(dtype: torch.dtype, device: torch.device) -> None:
    x_TD, w_ED = torch.randn(21, 700).to(dtype), torch.randn(12, 700)
    exact = x_TD.double() @ w_ED.double().T
    for tile_t in router_logits.TILES_T:
        assert close(router_logits.launch(x_TD, w_ED, tile_t), exact, share=1e-6)


def test_every_tile_gives_the_router_the_same_bits(device: torch.device) -> None:
    x_TD, w_ED = exact_in_pieces(19, 1100, 64).bfloat16(), small(12, 1100)
    results = [bits(router_logits.launch(x_TD, w_ED, tile_t)) for tile_t in router_logits.TILES_T]
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_are_alone(rows_are_alone: RowsStandAlone, device: torch.device) -> None:
    x, w = small_rows(35, 256), fp8_gemm.prepare_stored([small_fp8(70, 256)])
    rows_are_alone(lambda row_M: fp8_gemm.launch(x[row_M], w, torch.float32), 35)
    x_THK, w_HKN = (
        exact_in_pieces(70, 100, 64).view(35, 2, 100).bfloat16(),
        small(2, 100, 20).bfloat16(),
    )
    rows_are_alone(lambda row_M: absorb.launch(x_THK[row_M], w_HKN), 35)
    x_TD, w_ED = exact_in_pieces(35, 600, 64).bfloat16(), small(12, 600)
    rows_are_alone(lambda row_M: router_logits.launch(x_TD[row_M], w_ED), 35)


def test_no_rows_and_no_slots(device: torch.device) -> None:
    none = grouped_gemm.prepare_stacked([], 24)
    counts_e = torch.empty(0, dtype=torch.int64)
    assert grouped_gemm.launch(torch.empty(0, 40), counts_e, none, torch.bfloat16).shape == (0, 24)
    some = grouped_gemm.prepare_stacked([[StoredWeight(torch.randn(24, 40))]], 24)
    assert grouped_gemm.launch(torch.empty(0, 40), torch.tensor([0]), some, torch.float32).shape == (0, 24)
    padding = torch.full((3, 40), torch.nan)  # rows past the sum of the counts are nobody's
    assert grouped_gemm.launch(padding, counts_e, none, torch.bfloat16).shape == (3, 24)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: _launch(x=torch.randn(2, 9)), r"^x: shape \[2, 9\], expected \[any, 8\]"),
    (lambda: _launch(x=torch.randn(2, 8).double()), "^x: torch.float64, expected"),
    (lambda: _launch(x=torch.randn(8, 2).T), r"^x: strides \[1, 2\]"),
    (lambda: _launch(x=act_quant.reference(torch.randn(2, 8), 32)), "^x: quantised, and the weights have no"),
    (lambda: _launch(w=fp8_gemm.prepare([StoredWeight(torch.randn(4, 8))])), "^w: Linear, expected what"),
    (lambda: _launch(x=torch.randn(2, 8, device="meta")), "^w.w: on .*, the other tensors on meta"),
]


def _launch(x: Tensor | QuantisedRows | None = None, w: fp8_gemm.Linear | None = None) -> Tensor:
    x = torch.randn(2, 8) if x is None else x
    w = w or fp8_gemm.prepare_stored([StoredWeight(torch.randn(4, 8))])
    return fp8_gemm.launch(x, w, torch.float32)


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_argument_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
