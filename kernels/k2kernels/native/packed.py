"""Weights as the native kernels read them: panels of 16 outputs, float8 kept as it is (`native/abi.h`).

A panel never crosses a row of scale blocks, so it has one scale per block of inputs; parts of one linear
(gate and up; q_a and kv_a) each have panels of their own. Two parts of equal size take turns, two panels
each: a group of four then holds two panels of gate and the like of up.

S slots, P panels, N outputs, K inputs, n and k scale blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from k2kernels.fp8_gemm import StoredWeight
from k2kernels.native.library import BF16, FP8, Packed, load

PANEL = 16
BLOCK = 128  # of inputs, where no scale sets it
BLOCK_MAX = 128  # what a kernel's scratch holds of a panel


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear (S = 1), or many of one shape. `block`: of the activations' scales; None: they have none.

    data: uint8 [S, bytes]; scale: float32 [S, P, k] or None.
    """

    data: Tensor
    scale: Tensor | None
    block: int | None
    num_outputs: int
    num_inputs: int
    packed: _Handle = field(compare=False, repr=False)

    @property
    def num_slots(self) -> int:
        return self.data.shape[0]


class _Handle:
    """The C structure, and the panels, whose memory it points to."""

    def __init__(self, packed: Packed, panels: _Panels) -> None:
        self.packed = packed
        self.pointer = ctypes.pointer(packed)
        self.panels = panels


@dataclass(frozen=True, slots=True)
class _Panels:
    """Where panels begin in their part and in the output, and how many rows each has."""

    part: np.ndarray
    row: np.ndarray
    column: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[int], block: int) -> _Panels:
        """`rows` of each part, in scale blocks of `block` rows."""
        parts: list[list[tuple[int, int, int, int]]] = []
        column = 0
        for part, num_rows in enumerate(rows):
            starts = [
                (row, min(PANEL, start + block - row, num_rows - row))
                for start in range(0, num_rows, block)
                for row in range(start, min(start + block, num_rows), PANEL)
            ]
            parts.append([(part, row, column + row, width) for row, width in starts])
            column += num_rows
        table = np.array(_in_turn(parts), dtype=np.int32).reshape(-1, 4).T
        return cls(*(np.ascontiguousarray(x) for x in table))


def _in_turn(parts: list[list[tuple[int, int, int, int]]]) -> list[tuple[int, int, int, int]]:
    if len(parts) != 2 or len(parts[0]) != len(parts[1]):
        return [panel for part in parts for panel in part]
    both = []
    for first in range(0, len(parts[0]), 2):
        both += parts[0][first : first + 2] + parts[1][first : first + 2]
    return both


def pack_slots(
    slots: Sequence[Sequence[StoredWeight]],
    num_outputs: int,
    threads: int,
    *,
    are_acts_quantised: bool = True,
) -> PackedLinear:
    """`slots[s]`: the parts of slot s, whose outputs follow one another. All slots have the same shapes.

    Where weights have scales, activations are quantised alike unless said. What is returned shares no memory
    with the parts.
    """
    if not slots:
        return _empty(num_outputs)
    first = slots[0]
    scaled = first[0].block is not None
    block = first[0].block or BLOCK
    assert block <= BLOCK_MAX, f"scale blocks of {block}: the native kernels take at most {BLOCK_MAX}"
    rows, num_inputs = [len(part.w_NK) for part in first], first[0].w_NK.shape[1]
    assert sum(rows) == num_outputs, f"{sum(rows)} outputs, not {num_outputs}"
    for parts in slots:
        _check_alike(parts, first)
    panels = _Panels.of(rows, block)
    num_panels, num_blocks = len(panels.row), -(-num_inputs // block)
    depth = sum(-(-min(block, num_inputs - k) // 32) * 32 for k in range(0, num_inputs, block))
    panel_bytes = depth * PANEL * (1 if scaled else 2)
    data = torch.empty(len(slots), num_panels * panel_bytes, dtype=torch.uint8)
    load().advise(data.data_ptr(), data.nbytes)
    scale = torch.empty(len(slots), num_panels, num_blocks) if scaled else None
    _lay(slots, panels, block, panel_bytes, data, scale, threads, compares=False)
    act_block = first[0].block if are_acts_quantised else None
    return _finished(data, scale, act_block, block, num_outputs, num_inputs, num_blocks, panel_bytes, panels)


def holds_slots(w: PackedLinear, slots: Sequence[Sequence[StoredWeight]], threads: int) -> bool:
    """Whether `w` is what `pack_slots` would make of these; no memory is taken."""
    if not slots:
        return w.num_slots == 0
    for parts in slots:
        _check_alike(parts, slots[0])
    first, packed = slots[0][0], w.packed.packed
    assert (len(slots), first.block, first.w_NK.shape[1]) == (w.num_slots, w.block, w.num_inputs), (
        f"{len(slots)} slots of {first.w_NK.shape[1]} inputs, scales of {first.block}: packed were others"
    )
    return _lay(
        slots, w.packed.panels, packed.block, packed.panel_bytes, w.data, w.scale, threads, compares=True
    )


def _lay(
    slots: Sequence[Sequence[StoredWeight]],
    panels: _Panels,
    block: int,
    panel_bytes: int,
    data: Tensor,
    scale: Tensor | None,
    threads: int,
    *,
    compares: bool,
) -> bool:
    """Fill `data` and `scale`, or only compare them: whether they hold the slots then."""
    first = slots[0][0]
    scales = [p.scale_nk.float().contiguous() for parts in slots for p in parts if p.scale_nk is not None]
    differs = load().pack(
        threads,
        compares,
        BF16 if first.block is None else FP8,
        len(slots),
        len(slots[0]),
        _pointers([part.w_NK for parts in slots for part in parts]),
        _pointers(scales),
        first.w_NK.shape[1],
        *first.w_NK.stride(),
        block,
        len(panels.row),
        panels.part.ctypes.data,
        panels.row.ctypes.data,
        panels.width.ctypes.data,
        panel_bytes,
        data.data_ptr(),
        None if scale is None else scale.data_ptr(),
    )
    return not differs


def _check_alike(parts: Sequence[StoredWeight], first: Sequence[StoredWeight]) -> None:
    """What one call takes: `parts` with the shapes of `first`, and all lying alike."""
    block, stride = first[0].block, first[0].w_NK.stride()
    wanted = torch.bfloat16 if block is None else torch.float8_e4m3fn
    assert [part.w_NK.shape for part in parts] == [part.w_NK.shape for part in first], "slots differ"
    for part in parts:
        w_NK, scale_nk = part.w_NK, part.scale_nk
        assert part.block == block, "parts of one linear are quantised alike"
        assert w_NK.dtype == wanted, f"a weight of {w_NK.dtype}, expected {wanted}"
        assert w_NK.stride() == stride, "parts of one linear lie alike"
        if scale_nk is None or block is None:
            continue
        num_blocks = tuple(-(-size // block) for size in w_NK.shape)
        assert scale_nk.shape == num_blocks, (
            f"scales {list(scale_nk.shape)} for a weight {list(w_NK.shape)} in blocks of {block}"
        )


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p] | None:
    """None: there are none."""
    if not tensors:
        return None
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _finished(
    data: Tensor,
    scale: Tensor | None,
    act_block: int | None,
    block: int,
    num_outputs: int,
    num_inputs: int,
    num_blocks: int,
    panel_bytes: int,
    panels: _Panels,
) -> PackedLinear:
    packed = Packed(
        kind=BF16 if scale is None else FP8,
        are_acts_quantised=act_block is not None,
        block=block,
        num_panels=len(panels.row),
        num_blocks=num_blocks,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        panel_bytes=panel_bytes,
        data=data.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        column=panels.column.ctypes.data,
        width=panels.width.ctypes.data,
    )
    return PackedLinear(data, scale, act_block, num_outputs, num_inputs, _Handle(packed, panels))


def _empty(num_outputs: int) -> PackedLinear:
    """Of a rank without slots."""
    nothing = _Handle(Packed(), _Panels.of([], BLOCK))
    return PackedLinear(torch.empty(0, 0, dtype=torch.uint8), None, None, num_outputs, 0, nothing)
