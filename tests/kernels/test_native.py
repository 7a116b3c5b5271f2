"""The native kernels, every ISA of this machine, against the references; and a row's bits are its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import Experts, KernelSet, QuantisedRows, Rule, StoredWeight, act_quant, fp8_gemm
from k2kernels.native import ISAS, NoNativeKernelsError, library, load
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone

try:
    HERE = tuple(load().isas)
except NoNativeKernelsError as error:
    pytest.skip(str(error), allow_module_level=True)

REFERENCE = KernelSet.reference()
# Of a sum's magnitude. Products of e4m3 values are exact in float32; what differs is the order of additions
# (at most 128 + k / 128 of them, each off by 2^-24 of a partial sum).
SUM_ERROR = 3e-6


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> KernelSet:
    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    return KernelSet.native(request.param, num_threads=2)


def stored(rows: int, cols: int, block: int = 128) -> StoredWeight:
    w_NK = (torch.randn(rows, cols) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return StoredWeight(w_NK, torch.rand(-(-rows // block), -(-cols // block)) + 0.1, block)


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# -- float8 --------------------------------------------------------------------------------------------------


def test_every_code_is_decoded_exactly(native: KernelSet) -> None:
    """Weights of one code each, times 1: the code's value, NaN too. As weights and as activations."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wanted = codes.float() + 0.0  # -0 is not told from 0: it adds nothing
    w_NK = torch.zeros(256, 4).to(torch.float8_e4m3fn)
    w_NK.view(torch.uint8)[:, 2] = codes.view(torch.uint8)
    one = QuantisedRows(torch.eye(4)[2:3].to(torch.float8_e4m3fn), torch.ones(1, 1), 128)
    linear = native.prepare_linear([StoredWeight(w_NK, torch.ones(2, 1), 128)])
    assert torch.equal(native.fp8_gemm(one, linear, torch.float32)[0].nan_to_num(9e9), wanted.nan_to_num(9e9))

    one_NK = torch.ones(1, 1).to(torch.float8_e4m3fn)
    unit = native.prepare_linear([StoredWeight(one_NK, torch.ones(1, 1), 128)])
    rows = QuantisedRows(codes[:, None], torch.ones(256, 1), 128)
    found = native.fp8_gemm(rows, unit, torch.float32)[:, 0] + 0.0
    assert torch.equal(found.nan_to_num(9e9), wanted.nan_to_num(9e9))


def test_a_chunk_of_rare_codes_is_decoded(native: KernelSet) -> None:
    """Zeros, subnormals and NaN among others, in every place of a panel."""
    for code in (0x00, 0x01, 0x07, 0x80, 0x85, 0x7F, 0xFF):
        w_NK = (torch.rand(16, 64) * 8 + 1).to(torch.float8_e4m3fn)
        w_NK.view(torch.uint8)[torch.rand(16, 64) < 0.2] = code
        linear = native.prepare_linear([StoredWeight(w_NK, torch.ones(1, 1), 128)])
        eye = QuantisedRows(torch.eye(64).to(torch.float8_e4m3fn), torch.ones(64, 1), 128)
        found_NK = native.fp8_gemm(eye, linear, torch.float32).T
        wanted_NK = w_NK.float()
        if code in (0x7F, 0xFF):  # 0 * NaN: a row that holds one is NaN everywhere
            wanted_NK[wanted_NK.isnan().any(1)] = torch.nan
        assert torch.equal(found_NK.nan_to_num(9e9) + 0.0, wanted_NK.nan_to_num(9e9) + 0.0)


@pytest.mark.parametrize("width", [1, 100, 128, 300, 1536])
@pytest.mark.parametrize("block", [16, 128])
def test_activations_are_quantised_as_by_the_reference(native: KernelSet, width: int, block: int) -> None:
    size = torch.tensor([1e-3, 1, 1e4, 1, 3, 1e-6, 30, 0, 1e30])[:, None]
    x_TK = (torch.randn(9, width) * size).bfloat16()
    x_TK[3, width // 2], x_TK[4, 0] = torch.nan, torch.inf
    wanted, found = act_quant.reference(x_TK, block), native.act_quant(x_TK, block)
    assert same_bits(found.scale_Tk.nan_to_num(-1), wanted.scale_Tk.nan_to_num(-1))
    assert torch.equal(found.q_TK.float().nan_to_num(9e9), wanted.q_TK.float().nan_to_num(9e9))
    assert torch.equal(
        native.unpack(native.pack(x_TK, block), width, block).float().nan_to_num(9e9),
        wanted.float().nan_to_num(9e9),
    )


def test_grid_points_are_nearest_ties_to_even(native: KernelSet) -> None:
    """Every bfloat16 of a group whose scale is 1, so also every midpoint of two e4m3 values."""
    x_TK = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x_TK = x_TK[x_TK.float().abs() <= 448].view(-1, 1).expand(-1, 2).contiguous()
    x_TK[:, 1] = 448.0
    assert torch.equal(native.act_quant(x_TK, 128).q_TK.float(), x_TK.float().to(torch.float8_e4m3fn).float())


# -- linears -------------------------------------------------------------------------------------------------

SHAPES = [(128, 128), (192, 256), (576, 512), (64, 300), (1, 1), (17, 130), (300, 1100)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_a_linear_is_the_reference(native: KernelSet, rows: int, cols: int) -> None:
    weight = stored(rows, cols)
    linear, wanted = native.prepare_linear([weight]), REFERENCE.prepare_linear([weight])
    for num_tokens in (0, 1, 16, 33, 70):
        x_TK = (torch.randn(num_tokens, cols) * 3).bfloat16()
        y_TN = native.linear(x_TK, linear, torch.float32)
        z_TN = REFERENCE.linear(x_TK, wanted, torch.float32)
        magnitude_TN = act_quant.reference(x_TK, 128).float().abs() @ fp8_gemm.dequantise(weight).abs().T
        assert ((y_TN - z_TN).abs() <= SUM_ERROR * magnitude_TN).all()
        assert same_bits(native.linear(x_TK, linear), y_TN.bfloat16())
        assert same_bits(native.fp8_gemm(native.act_quant(x_TK, 128), linear, torch.float32), y_TN)


@pytest.mark.parametrize("block", [16, 20, 32, 128])
def test_parts_follow_one_another(native: KernelSet, block: int) -> None:
    """The same bits as each by itself, also where scale blocks and panels do not fit."""
    parts = [stored(192, 256, block), stored(65, 256, block), stored(576, 256, block)]
    x_TK = torch.randn(5, 256).bfloat16()
    both = native.linear(x_TK, native.prepare_linear(parts), torch.float32)
    alone = [native.linear(x_TK, native.prepare_linear([part]), torch.float32) for part in parts]
    assert same_bits(both, torch.cat(alone, dim=1))


@pytest.mark.parametrize(("rows", "cols"), [(51, 96), (128, 128), (33, 300), (1, 1), (200, 1024)])
def test_unquantised_linears_are_the_reference(native: KernelSet, rows: int, cols: int) -> None:
    w_NK = torch.randn(rows, cols).bfloat16()
    linear = native.prepare_plain(w_NK)
    for num_tokens in (0, 1, 37):
        x_TK = torch.randn(num_tokens, cols).bfloat16()
        y_TN = native.linear_bf16(x_TK, linear, torch.float32)
        magnitude_TN = x_TK.double().abs() @ w_NK.double().abs().T
        assert ((y_TN - x_TK.double() @ w_NK.double().T).abs() <= SUM_ERROR * magnitude_TN).all()
    stored_plain = native.prepare_linear([StoredWeight(w_NK)])
    assert same_bits(native.linear(x_TK, stored_plain, torch.float32), y_TN)


def test_rows_of_linears_stand_alone(native: KernelSet, rows_stand_alone: RowsStandAlone) -> None:
    linear = native.prepare_linear([stored(200, 300)])
    head = native.prepare_plain(torch.randn(70, 300).bfloat16())
    x_TK = torch.randn(70, 300).bfloat16()
    rows_stand_alone(lambda row_M: native.linear(x_TK[row_M], linear, torch.float32), 70)
    rows_stand_alone(lambda row_M: native.linear_bf16(x_TK[row_M], head, torch.float32), 70)


def test_any_number_of_rows_and_threads_gives_the_same_bits(native: KernelSet) -> None:
    """Row counts 1 to 40, and as many as make a second chunk; one, two and five threads."""
    linear, x_TK = native.prepare_linear([stored(80, 200)]), torch.randn(600, 200).bfloat16()
    whole = native.linear(x_TK, linear, torch.float32)
    for num_rows in (*range(1, 41), 511, 512, 513):
        first = 600 - num_rows
        assert same_bits(native.linear(x_TK[first:], linear, torch.float32), whole[first:]), num_rows
    for num_threads in (1, 5):
        other = KernelSet.native(native.versions[0], num_threads)
        assert same_bits(other.linear(x_TK, linear, torch.float32), whole)


def test_nan_stays_in_its_row(native: KernelSet) -> None:
    linear, x_TK = native.prepare_linear([stored(70, 300)]), torch.randn(20, 300).bfloat16()
    clean = native.linear(x_TK, linear, torch.float32)
    x_TK[7, 200] = torch.nan
    found = native.linear(x_TK, linear, torch.float32)
    others = [t for t in range(20) if t != 7]
    assert found[7].isnan().all()
    assert same_bits(found[others], clean[others])


def test_strided_activations(native: KernelSet) -> None:
    linear, wide_TK = native.prepare_linear([stored(40, 96)]), torch.full((6, 200), torch.nan).bfloat16()
    wide_TK[:, 50:146] = torch.randn(6, 96).bfloat16()
    x_TK = wide_TK[:, 50:146]
    assert same_bits(native.linear(x_TK, linear), native.linear(x_TK.contiguous(), linear))


# -- MLPs and experts ----------------------------------------------------------------------------------------


def parts_of(hidden: int, width: int, block: int | None) -> tuple[StoredWeight, StoredWeight, StoredWeight]:
    def one(rows: int, cols: int) -> StoredWeight:
        if block is None:
            return StoredWeight((torch.randn(rows, cols) / cols**0.5).bfloat16())
        scale_nk = torch.rand(-(-rows // block), -(-cols // block)) / 900
        return dataclasses.replace(stored(rows, cols, block), scale_nk=scale_nk)

    return one(width, hidden), one(width, hidden), one(hidden, width)


@pytest.mark.parametrize(
    ("hidden", "width", "block"), [(256, 128, 128), (96, 64, 32), (100, 50, 16), (96, 40, None)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
def test_a_fused_mlp_is_its_steps(
    native: KernelSet, hidden: int, width: int, block: int | None, num_tokens: int
) -> None:
    gate, up, down = parts_of(hidden, width, block)
    gate_up, down_w = native.prepare_linear([gate, up]), native.prepare_linear([down])
    x_TD = torch.randn(num_tokens, hidden).bfloat16()
    steps = dataclasses.replace(native, whole_mlp=None, whole_linear=None)
    fused = native.mlp(x_TD, gate_up, down_w, torch.float32)
    assert same_bits(fused, steps.mlp(x_TD, gate_up, down_w, torch.float32))
    plain = REFERENCE.prepare_linear([gate, up]), REFERENCE.prepare_linear([down])
    wanted = REFERENCE.mlp(x_TD, *plain, torch.float32)
    # A gate one bfloat16 off may move an activation to the next e4m3 value, 6% of it; few do.
    assert float((fused - wanted).norm()) <= 0.01 * float(wanted.norm())


@pytest.mark.parametrize("block", [32, None])
def test_an_experts_output_is_that_of_a_plain_mlp(native: KernelSet, block: int | None) -> None:
    parts = [parts_of(96, 64, block) for _ in range(4)]
    experts = Experts(
        gate_up=native.prepare_grouped([(gate, up) for gate, up, _ in parts], 128),
        down=native.prepare_grouped([(down,) for _, _, down in parts], 96),
    )
    x_ND = torch.randn(60, 96).bfloat16()
    rows = native.wire_unpack(native.wire_pack(x_ND, block), 96, block)
    row_M = torch.randint(0, 60, (90,))
    slot_M = torch.tensor([0, 1, 3])[torch.randint(0, 3, (90,))].sort().values  # nobody asks for expert 2
    counts_e = slot_M.bincount(minlength=4)
    out_MD = native.experts(rows, row_M, counts_e, experts)
    assert out_MD.dtype == torch.bfloat16
    composed = dataclasses.replace(native, whole_experts=None).experts(rows, row_M, counts_e, experts)
    assert same_bits(out_MD, composed)
    for slot, (gate, up, down) in enumerate(parts):
        alone = native.mlp(x_ND, native.prepare_linear([gate, up]), native.prepare_linear([down]))
        assert same_bits(out_MD[slot_M == slot], alone[row_M[slot_M == slot]])


@pytest.mark.parametrize(("rows", "cols"), [(128, 256), (200, 96), (17, 300)])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_comparison_sees_every_byte(native: KernelSet, rows: int, cols: int, scaled: bool) -> None:
    """`holds_grouped`: of weights and scales, also of the last slot's last panel; and it changes nothing."""
    assert native.holds_grouped is not None
    parts = [
        stored(rows, cols) if scaled else StoredWeight(torch.randn(rows, cols).bfloat16()) for _ in "abcdef"
    ]
    slots = [parts[:2], parts[2:4], parts[4:]]
    packed = native.prepare_grouped(slots, 2 * rows)
    assert native.holds_grouped(packed, slots)
    assert not native.holds_grouped(packed, [slots[0], slots[2], slots[1]])
    for tensor in (packed.data, packed.scale):
        if tensor is None:
            continue
        held = tensor.view(torch.uint8).view(len(slots), -1)
        for slot, byte in ((0, 0), (1, held.shape[1] // 2), (2, -1)):
            held[slot, byte] ^= 0x10
            assert not native.holds_grouped(packed, slots)
            held[slot, byte] ^= 0x10
    assert native.holds_grouped(packed, slots)
    assert native.holds_grouped(native.prepare_grouped([], rows), [])


def test_no_rows_and_no_slots(native: KernelSet) -> None:
    none = native.prepare_grouped([], 24)
    counts_e, row_M = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    x_ND = torch.empty(0, 40).bfloat16()
    assert native.grouped_gemm(x_ND, counts_e, none, torch.bfloat16).shape == (0, 24)
    experts = Experts(none, native.prepare_grouped([], 40))
    assert native.experts(x_ND, row_M, counts_e, experts).shape == (0, 40)


# -- row by row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "width"), [(0, 8), (1, 1), (5, 33), (40, 512)])
def test_what_is_done_row_by_row_is_the_reference(native: KernelSet, num_tokens: int, width: int) -> None:
    x_TD, weight_D = (torch.randn(num_tokens, width) * 7).bfloat16(), torch.randn(width).bfloat16()
    found, wanted = native.rmsnorm(x_TD, weight_D, 1e-3), REFERENCE.rmsnorm(x_TD, weight_D, 1e-3)
    assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=0)  # one unit: the sum's order
    h_TG = (torch.randn(num_tokens, 2 * width) * 4).bfloat16()
    assert same_bits(native.swiglu(h_TG), REFERENCE.swiglu(h_TG))
    x_THR, angle_TF = torch.randn(num_tokens, 3, 2 * width).bfloat16(), torch.rand(num_tokens, width) * 6
    turned = native.rope(x_THR[..., :], angle_TF.cos(), angle_TF.sin())
    assert same_bits(turned, REFERENCE.rope(x_THR, angle_TF.cos(), angle_TF.sin()))
    out_TKD = torch.randn(num_tokens, 3, width).bfloat16()
    weight_TK, shared_TD = torch.rand(num_tokens, 3), torch.randn(num_tokens, width)
    for dtype in (torch.bfloat16, torch.float32):
        assert same_bits(
            native.weighted_sum(out_TKD, weight_TK, shared_TD, dtype),
            REFERENCE.weighted_sum(out_TKD, weight_TK, shared_TD, dtype),
        )


@pytest.mark.parametrize(
    "rule", [Rule(3, 1, 1, True, 2.827), Rule(4, 4, 2, False, 1.0), Rule(1, 1, 1, True, 1.0)]
)
def test_the_router_chooses_as_the_reference(native: KernelSet, rule: Rule) -> None:
    logit_TE, bias_E = torch.randn(60, 20) * 3, torch.randn(20)
    logit_TE[0], logit_TE[1] = 0.0, -200.0  # all alike; none scores
    logit_TE[2, ::2] = logit_TE[2, 1]
    for bias in (bias_E, torch.zeros(20)):
        wanted, found = REFERENCE.router_topk(logit_TE, bias, rule), native.router_topk(logit_TE, bias, rule)
        assert torch.equal(found[0], wanted[0])
        assert same_bits(found[1], wanted[1])


@pytest.mark.parametrize(("experts", "width"), [(12, 96), (64, 1024), (3, 17)])
def test_router_logits_are_float32(native: KernelSet, experts: int, width: int) -> None:
    w_ED = torch.randn(experts, width)
    for num_tokens in (0, 1, 37, 70):
        x_TD = torch.randn(num_tokens, width).bfloat16()
        exact = x_TD.double() @ w_ED.double().T
        magnitude = x_TD.double().abs() @ w_ED.double().abs().T
        assert ((native.router_logits(x_TD, w_ED) - exact).abs() <= 1e-6 * magnitude).all()


def test_rows_of_the_rest_stand_alone(native: KernelSet, rows_stand_alone: RowsStandAlone) -> None:
    x_TD, weight_D, w_ED = torch.randn(50, 100).bfloat16(), torch.randn(100).bfloat16(), torch.randn(12, 100)
    rows_stand_alone(lambda row_M: native.rmsnorm(x_TD[row_M], weight_D, 1e-6), 50)
    rows_stand_alone(lambda row_M: native.router_logits(x_TD[row_M], w_ED), 50)
    rows_stand_alone(lambda row_M: native.act_quant(x_TD[row_M], 32).float(), 50)
    x_THK, values = torch.randn(50, 3, 48).bfloat16(), native.prepare_values(heads_of(3, 48, 40, block=32))
    rows_stand_alone(lambda row_M: native.absorb(x_THK[row_M], values), 50)


def heads_of(heads: int, inputs: int, outputs: int, block: int | None) -> list[StoredWeight]:
    """A weight [outputs, inputs] per head."""
    if block is None:
        return [StoredWeight(torch.randn(outputs, inputs).bfloat16()) for _ in range(heads)]
    return [stored(outputs, inputs, block) for _ in range(heads)]


@pytest.mark.parametrize("block", [None, 32, 128])
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(3, 16, 40), (8, 128, 512), (2, 130, 17)])
def test_absorb_multiplies_per_head(
    native: KernelSet, heads: int, inputs: int, outputs: int, block: int | None
) -> None:
    """Activations are not quantised, whatever the weights are; keys are taken the other way round."""
    weights = heads_of(heads, inputs, outputs, block)
    w_HNK = torch.stack([fp8_gemm.dequantise(weight) for weight in weights]).double()
    for num_tokens in (0, 1, 4, 37):
        for num_inputs, turned_HNK, prepared in (
            (inputs, w_HNK, native.prepare_values(weights)),
            (outputs, w_HNK.transpose(1, 2), native.prepare_keys(weights)),
        ):
            x_THK = torch.randn(num_tokens, heads, num_inputs + 7).bfloat16()[..., :num_inputs]
            exact = torch.einsum("thk,hnk->thn", x_THK.double(), turned_HNK)
            magnitude = torch.einsum("thk,hnk->thn", x_THK.double().abs(), turned_HNK.abs())
            off = (native.absorb(x_THK, prepared).double() - exact).abs()
            assert (off <= 2**-8 * exact.abs() + 1e-5 * magnitude).all()


# -- threads -------------------------------------------------------------------------------------------------


def test_ranks_of_one_process_call_at_once(native: KernelSet) -> None:
    """Four callers, two threads each: the pool helps one at a time, none waits for it, all are right."""
    linear, x_TK = native.prepare_linear([stored(200, 300)]), torch.randn(70, 300).bfloat16()
    wanted = native.linear(x_TK, linear, torch.float32)

    def call(num_rows: int) -> bool:
        return all(
            same_bits(native.linear(x_TK[:num_rows], linear, torch.float32), wanted[:num_rows])
            for _ in range(50)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, (1, 17, 70, 70)))


def test_a_forked_child_makes_threads_of_its_own(native: KernelSet) -> None:
    linear, x_TK = native.prepare_linear([stored(200, 300)]), torch.randn(40, 300).bfloat16()
    wanted = native.linear(x_TK, linear, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(native.linear(x_TK, linear, torch.float32), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


# -- the fault is named --------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(native: KernelSet) -> None:
    linear = native.prepare_linear([stored(32, 64)])
    with pytest.raises(AssertionError, match=r"x is torch\.float32, expected torch\.bfloat16"):
        native.linear(torch.randn(2, 64), linear)
    with pytest.raises(AssertionError, match="x has 60 columns, the weights 64 inputs"):
        native.linear(torch.randn(2, 60).bfloat16(), linear)
    with pytest.raises(AssertionError, match="groups of 32, weights of 128"):
        native.fp8_gemm(act_quant.reference(torch.randn(2, 64), 32), linear, torch.float32)
    with pytest.raises(AssertionError, match="its last axis is not contiguous"):
        native.rmsnorm(torch.randn(8, 4).bfloat16().T, torch.ones(8).bfloat16(), 1e-6)


def test_the_isa_is_in_the_fingerprint() -> None:
    assert len({KernelSet.native(isa).fingerprint() for isa in HERE}) == len(HERE)
    assert KernelSet.native().versions[0] == HERE[-1]


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    """As after `git pull` without installing again: it would be called with other structures."""
    (tmp_path / library.NAME).symlink_to(Path(library.__file__).with_name(library.NAME))
    newer = tmp_path / "newer_library.py"
    newer.write_text(Path(library.__file__).read_text("utf-8") + "\n# a structure has changed\n", "utf-8")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import newer_library; newer_library.load()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "NoNativeKernelsError" in done.stderr
    assert "is of another version of k2dist: install k2dist again" in done.stderr
