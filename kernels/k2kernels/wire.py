"""How a row travels to the ranks of its experts, and what it is there.

    quantised   [q: D bytes e4m3 | scales: 4 bytes per 128 channels] as uint8      W = D + 4 k
    plain       the row itself, in its own dtype                                   W = D

T rows (may be 0), D width, k = ceil(D / block). Packing is where a row is quantised, so a row that stays on
its rank is rounded as one that leaves it. Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2
(activations are quantised to FP8 before dispatch).
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels import act_quant
from k2kernels.act_quant import QuantisedRows

_SCALE_BYTES = 4  # float32


def pack(x_TD: Tensor, block: int | None) -> Tensor:
    """Rows of the wire: quantised in groups of `block` channels, or plain where it is None."""
    if block is None:
        return x_TD
    rows = act_quant.reference(x_TD, block)
    # A fresh tensor: contiguous() lets one without rows keep strides that cannot be viewed as bytes.
    scale_Tk = torch.empty(rows.scale_Tk.shape, device=x_TD.device).copy_(rows.scale_Tk)
    return torch.cat((rows.q_TK.view(torch.uint8), scale_Tk.view(torch.uint8)), dim=1)


def pack_on_device(x_TD: Tensor, block: int | None) -> Tensor:
    """As `pack`, with the same bytes: Triton writes numbers and scales where they travel."""
    if block is None:
        return x_TD
    (num_tokens, width), num_groups = x_TD.shape, -(-x_TD.shape[1] // block)
    if width % _SCALE_BYTES:
        raise ValueError(
            f"x_TD: {width} columns; scales behind them must lie at a multiple of {_SCALE_BYTES} bytes"
        )
    row_TW = torch.empty(num_tokens, width + _SCALE_BYTES * num_groups, dtype=torch.uint8, device=x_TD.device)
    q_TD, scale_Tk = _parts(row_TW, width)
    act_quant.launch_into_(q_TD, scale_Tk, x_TD, block)
    return row_TW


def unpack_on_device(row_TW: Tensor, width: int, block: int | None) -> Tensor | QuantisedRows:
    """As `unpack`, without a copy where the rows lie as `pack_on_device` laid them."""
    is_aligned = row_TW.data_ptr() % _SCALE_BYTES == 0 and row_TW.stride() == (row_TW.shape[1], 1)
    if block is None or not is_aligned or len(row_TW) == 0 or row_TW.shape[1] % _SCALE_BYTES:
        return unpack(row_TW, width, block)
    _check_width(row_TW, width, block)
    q_TD, scale_Tk = _parts(row_TW, width)
    return QuantisedRows(q_TD, scale_Tk, block)


def _parts(row_TW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views of the numbers and the scales in rows whose bytes are aligned."""
    return row_TW[:, :width].view(torch.float8_e4m3fn), row_TW[:, width:].view(torch.float32)


def unpack(row_TW: Tensor, width: int, block: int | None) -> Tensor | QuantisedRows:
    """What `pack` was given, after its rounding. `width`: D."""
    if block is None:
        return row_TW
    _check_width(row_TW, width, block)
    q_TD, scale_TB = row_TW[:, :width].contiguous(), row_TW[:, width:].contiguous()
    return QuantisedRows(q_TD.view(torch.float8_e4m3fn), _as_float32(scale_TB), block)


def _check_width(row_TW: Tensor, width: int, block: int) -> None:
    expected = width + _SCALE_BYTES * -(-width // block)
    assert row_TW.shape[1] == expected, f"{row_TW.shape[1]} bytes in a row, expected {expected}"


def _as_float32(x_TB: Tensor) -> Tensor:
    """The bytes as float32. Copied: a slice of one row may keep an unaligned offset."""
    x_Tk = torch.empty(len(x_TB), x_TB.shape[1] // _SCALE_BYTES, dtype=torch.float32, device=x_TB.device)
    x_Tk.view(torch.uint8).copy_(x_TB)
    return x_Tk
